"""What a page is made of: one file each, which holds an ``OVERVIEW`` of all its runs, or a ``SECTION`` of one."""

from __future__ import annotations

from prunekit.report.sections import (
    comparison,
    headlines,
    kernel_account,
    models,
    provenance,
    pruned_models,
    size_figure,
    training_timeline,
)
from prunekit.report.sections.section import Overview, RunArtifacts, Section

__all__ = ["OVERVIEW", "SECTIONS", "Overview", "RunArtifacts", "Section"]

OVERVIEW: dict[str, Overview] = {
    "headlines": headlines.OVERVIEW,
    "size_figure": size_figure.OVERVIEW,
    "models": models.OVERVIEW,
}
"""Name -> overview, in the order of the page."""

SECTIONS: dict[str, Section] = {
    "pruned_models": pruned_models.SECTION,
    "kernel_account": kernel_account.SECTION,
    "training_timeline": training_timeline.SECTION,
    "comparison": comparison.SECTION,
    "provenance": provenance.SECTION,
}
"""Name -> section, in the order of the page, below the overviews."""
