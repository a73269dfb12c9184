"""The command line: one short file a verb, which parses, calls and prints."""

from __future__ import annotations

from importlib import import_module

from prunekit.cli.entry import main
from prunekit.cli.top import app

__all__ = ["VERBS", "app", "main"]

VERBS = (
    "train", "importing", "score", "compare", "prune", "evaluate", "sensitivity", "explain", "report", "run", "info", "trust",
)  # fmt: skip
"""Files of this room that add a verb, in the order of ``prunekit --help``."""

for verb in VERBS:
    import_module(f"prunekit.cli.{verb}")
