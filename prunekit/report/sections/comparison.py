"""Criteria compared on validation data: a picture, and a table a structure."""

from __future__ import annotations

from typing import Any

from prunekit.report.measures import deciding
from prunekit.report.plots import comparison_figure, inline
from prunekit.report.sections.section import RunArtifacts, Section
from prunekit.report.tables import accuracy_tables


def _values(run: RunArtifacts) -> dict[str, Any] | None:
    if run.comparison is None:
        return None
    return {
        "comparison": run.comparison,
        "picture": inline(comparison_figure(run.comparison)),
        "measure": deciding(run.comparison.measures),
        "tables": accuracy_tables(run.comparison),
    }


SECTION = Section(
    title="Criteria compared",
    values=_values,
    template='{% include "sections/comparison.html.j2" %}',
)
