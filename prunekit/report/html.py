"""A template of this folder, filled in: a page, or a part of one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from prunekit import checkpoint
from prunekit.explain.answers import text_of
from prunekit.report.glossary import GLOSSARY
from prunekit.version import __version__


def write_html(path: Path, template: str, **values: Any) -> None:
    """Writes ``path``, whole or not at all; whatever ``values`` hold is escaped, except what ``filled`` gave.

    Args:
        template: file name in ``prunekit/report``; it also gets ``version``, and the filters ``answer`` for labels and
            answers, and ``meaning`` for words of our own.
    """
    checkpoint.write_text(path, _environment().get_template(template).render(version=__version__, **values))


def filled(text: str, **values: Any) -> Markup:
    """A part of a page from a template's text; whatever ``values`` hold is escaped, and the part itself not again."""
    return Markup(_environment().from_string(text).render(**values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("prunekit", "report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["answer"] = text_of
    environment.filters["meaning"] = GLOSSARY.__getitem__
    return environment
