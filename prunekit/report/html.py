"""A template of this folder, filled in and written as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from prunekit import checkpoint
from prunekit.explain.answers import text_of
from prunekit.version import __version__


def write_html(path: Path, template: str, **values: Any) -> None:
    """Writes ``path``, whole or not at all; whatever ``values`` hold is escaped.

    Args:
        template: file name in ``prunekit/report``; it also gets ``version``, and the filter ``answer`` for labels and answers.
    """
    environment = Environment(
        loader=PackageLoader("prunekit", "report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["answer"] = text_of
    checkpoint.write_text(path, environment.get_template(template).render(version=__version__, **values))
