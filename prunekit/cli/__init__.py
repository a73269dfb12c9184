"""The command line: one short file a verb, which parses, calls and prints. A verb is there because its file is."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from prunekit.cli.entry import main
from prunekit.cli.top import app
from prunekit.cli.verb import put_in_order

__all__ = ["app", "main"]

for file in iter_modules(__path__, f"{__name__}."):
    import_module(file.name)
put_in_order()
