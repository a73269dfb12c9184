"""The whole run on one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunekit.report.html import filled, write_html
from prunekit.report.sections import SECTIONS, RunArtifacts


def write_page(path: Path, run: RunArtifacts, left_out: Sequence[str] = ()) -> list[str]:
    """Writes ``report.html``: the sections of everything that the run holds so far.

    Args:
        left_out: what the run folder holds but the page does not show, and why.

    Returns:
        what the page could show and does not, and which command adds it, one line each.
    """
    missing = [line for section in SECTIONS.values() for line in section.missing(run)] if run.has_data else []
    values_of = [(section, section.values(run)) for section in SECTIONS.values()]
    write_html(
        path,
        "page.html.j2",
        name=run.path.resolve().name,
        left_out=left_out,
        missing=missing,
        sections=[(filled(s.title, **values), filled(s.template, **values)) for s, values in values_of if values is not None],
    )
    return missing
