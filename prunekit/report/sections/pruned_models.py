"""Pruned models on test data: their figures beside the dense model's, what stayed by layer, and how their masks were refined."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prunekit.explain import EvaluationRecord
from prunekit.report.explain_page import plots_of
from prunekit.report.measures import Shown, shown
from prunekit.report.sections.section import RunArtifacts, Section


def _values(run: RunArtifacts) -> dict[str, Any] | None:
    if not run.evaluations:
        return None
    return {
        "evaluations": run.evaluations,
        "measures": _measures(run.evaluations.values()),
        "measures_of": {name: shown(e.measures) for name, e in run.evaluations.items()},
        "repairs": {name: (found, plots_of(found.told)) for name, found in run.removals.items()},
    }


def _measures(evaluations: Iterable[EvaluationRecord]) -> list[Shown]:
    """Of all evaluations, against labels first."""
    found = dict.fromkeys(measure for evaluation in evaluations for measure in shown(evaluation.measures))
    return sorted(found, key=lambda measure: measure.close)


def _missing(run: RunArtifacts) -> list[str]:
    refined = [name for name, evaluation in run.evaluations.items() if evaluation.refine and name not in run.removals]
    return [
        *(run.added_by_eval(f"evaluation of {name}", name) for name in run.pruned if name not in run.evaluations),
        *(run.added_by_eval(f"blame of what {name} removes", name) for name in refined),
    ]


SECTION = Section(
    title="Pruned models",
    values=_values,
    template='{% include "sections/pruned_models.html.j2" %}',
    missing=_missing,
)
