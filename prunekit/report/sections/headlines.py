"""The headline of every run: each pruned model in three figures, and the verdict as one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.report.headline import headline
from prunekit.report.measures import deciding
from prunekit.report.sections.section import Overview, RunArtifacts


def _values(runs: Sequence[RunArtifacts]) -> dict[str, Any] | None:
    if not any(run.models for run in runs):
        return None
    return {"runs": [_run(run) for run in runs], "several": len(runs) > 1}


def _run(run: RunArtifacts) -> dict[str, Any]:
    dense = ""
    if run.evaluations:
        first = next(iter(run.evaluations.values()))
        measure = deciding(first.measures)
        figure = measure.spaced(first.dense[measure.name])
        dense = f"{int(first.dense['parameters']):,} parameters, test {measure.brief} {figure}"
    evaluated = [name for name in run.models if name in run.evaluations]
    return {
        "name": run.name,
        "dense": dense,
        "models": [(name, run.evaluations[name].made_from, headline(run.evaluations[name])) for name in evaluated],
        "waiting": [(name, run.evaluating(name) if run.has_data else "") for name in run.models if name not in run.evaluations],
    }


OVERVIEW = Overview(
    title="In short",
    values=_values,
    template='{% include "sections/headlines.html.j2" %}',
)
