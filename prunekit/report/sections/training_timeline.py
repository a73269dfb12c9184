"""Training along its own time: which layer moved the outputs when, and which sample was learned when."""

from __future__ import annotations

from typing import Any

from prunekit.explain import Timeline
from prunekit.report.plots import inline
from prunekit.report.sections.section import RunArtifacts, Section
from prunekit.report.timeline import layer_figures, samples_figure


def _values(run: RunArtifacts) -> dict[str, Any] | None:
    timeline = run.one(Timeline)
    if timeline is None:
        return None
    return {
        "timeline": timeline,
        "pictures": {share: inline(figure) for share, figure in layer_figures(timeline).items()},
        "samples_picture": inline(samples_figure(timeline.samples)) if timeline.samples else None,
    }


def _missing(run: RunArtifacts) -> list[str]:
    if run.one(Timeline) is not None or run.trajectory["steps"] == 0:  # an imported model was not trained here
        return []
    return [run.added_by_eval("timeline of training", next(iter(run.pruned)) if run.pruned else "NAME, of any pruned model,")]


SECTION = Section(
    title="Training, seen along its own time",
    values=_values,
    template='{% include "sections/training_timeline.html.j2" %}',
    reads={Timeline: "timeline.json"},
    missing=_missing,
)
