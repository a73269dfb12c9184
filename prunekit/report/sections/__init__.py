"""The sections of a run's page: one file each, which holds a ``SECTION``."""

from __future__ import annotations

from prunekit.report.sections import comparison, kernel_account, provenance, pruned_models, training_timeline
from prunekit.report.sections.section import RunArtifacts, Section

__all__ = ["SECTIONS", "RunArtifacts", "Section"]

SECTIONS: dict[str, Section] = {
    "pruned_models": pruned_models.SECTION,
    "kernel_account": kernel_account.SECTION,
    "training_timeline": training_timeline.SECTION,
    "comparison": comparison.SECTION,
    "provenance": provenance.SECTION,
}
"""Name -> section, in the order of the page."""
