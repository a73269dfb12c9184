"""Pruned models one by one: what stayed by layer, what squeezing took out, and how their masks were refined."""

from __future__ import annotations

from typing import Any

from prunekit.report.explain_page import plots_of
from prunekit.report.measures import shown
from prunekit.report.sections.section import RunArtifacts, Section


def _values(run: RunArtifacts) -> dict[str, Any] | None:
    if not run.evaluations:
        return None
    return {
        "evaluations": run.evaluations,
        "measures_of": {name: shown(e.measures) for name, e in run.evaluations.items()},
        "repairs": {name: (found, plots_of(found.told)) for name, found in run.removals.items()},
    }


def _missing(run: RunArtifacts) -> list[str]:
    refined = [name for name, evaluation in run.evaluations.items() if evaluation.refine and name not in run.removals]
    return [
        *(run.added_by_eval(f"evaluation of {name}", name) for name in run.pruned if name not in run.evaluations),
        *(run.added_by_eval(f"blame of what {name} removes", name) for name in refined),
    ]


SECTION = Section(
    title="Pruned models, one by one",
    values=_values,
    template='{% include "sections/pruned_models.html.j2" %}',
    missing=_missing,
)
