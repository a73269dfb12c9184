"""Runs on one self-contained page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from prunekit.report.html import filled, write_html
from prunekit.report.sections import OVERVIEW, SECTIONS, RunArtifacts


class Part(NamedTuple):
    """A heading with what stands below it, and the name by which links lead to it."""

    anchor: str
    title: Markup
    body: Markup


class RunParts(NamedTuple):
    """A run's part of the page: what it lacks, and its sections."""

    anchor: str
    name: str
    missing: Sequence[str]
    parts: Sequence[Part]


def write_page(path: Path, runs: Sequence[RunArtifacts]) -> list[str]:
    """Writes a page: the overviews of all runs, then the sections of everything that each run holds so far.

    The page's own policy lets nothing be loaded, and no script run but its own.

    Returns:
        what the page could show and does not, and which command adds it, one line each.
    """
    drawn = [RunParts(f"run-{k}", run.name, _missing(run), _sections(f"run-{k}", run)) for k, run in enumerate(runs, 1)]
    script = filled('{% include "page.js.j2" %}')
    overview = [
        Part(name, filled(part.title, **values), filled(part.template, **values))
        for name, part in OVERVIEW.items()
        if (values := part.values(runs)) is not None
    ]
    write_html(
        path,
        "page.html.j2",
        name=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        left_out=[line for run in runs for line in run.left_out],
        overview=overview,
        runs=drawn,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return [line for run in drawn for line in run.missing]


def _missing(run: RunArtifacts) -> list[str]:
    return [line for section in SECTIONS.values() for line in section.missing(run)] if run.has_data else []


def _sections(anchor: str, run: RunArtifacts) -> list[Part]:
    return [
        Part(f"{anchor}-{name}", filled(section.title, **values), filled(section.template, **values))
        for name, section in SECTIONS.items()
        if (values := section.values(run)) is not None
    ]
