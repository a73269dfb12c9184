"""The whole run on one self-contained page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.explain import EvaluationRecord, RemovalRecord, Timeline
from prunekit.report.explain_page import plots_of
from prunekit.report.html import write_html
from prunekit.report.measures import Shown, deciding, shown
from prunekit.report.plots import comparison_figure, inline, layers_figure, training_figure
from prunekit.report.tables import accuracy_tables, trained
from prunekit.report.timeline import layer_figures, samples_figure
from prunekit.search.compare import Comparison
from prunekit.training.record import TrainingRecord


def write_page(
    path: Path,
    *,
    name: str,
    recipe: str,
    training: TrainingRecord | None,
    trajectory: dict[str, Any],
    scores: list[dict[str, Any]],
    comparison: Comparison | None,
    evaluations: Mapping[str, EvaluationRecord],
    repairs: Mapping[str, RemovalRecord],
    left_out: Sequence[str],
    missing: Sequence[str],
    timeline: Timeline | None,
) -> None:
    """Writes ``report.html``: curves and tables of everything that the run holds so far.

    Args:
        recipe: the resolved recipe as text.
        training: None for an imported model.
        trajectory: steps, coordinates, bytes, hash, cost.
        scores: one dict a score file (criterion, digest, seconds).
        evaluations: by pruned model's name.
        repairs: by refined model's name.
        left_out: what the run folder holds but the page does not show, and why.
        missing: what the run folder lacks, and which command adds it.
        timeline: None where there is no path or no data.
    """
    explained = {n: e.kernel for n, e in evaluations.items() if e.kernel is not None}
    write_html(
        path,
        "page.html.j2",
        name=name,
        recipe=recipe,
        training=training,
        trained=trained(training) if training else None,
        training_picture=inline(training_figure(training.losses)) if training else None,
        trajectory=trajectory,
        scores=scores,
        comparison=comparison,
        comparison_picture=inline(comparison_figure(comparison)) if comparison else None,
        measure=deciding(comparison.measures) if comparison else None,
        tables=accuracy_tables(comparison) if comparison else [],
        evaluations=evaluations,
        measures=_measures(evaluations.values()),
        measures_of={name: shown(e.measures) for name, e in evaluations.items()},
        explained=explained,
        repairs={name: (found, plots_of(found.told)) for name, found in repairs.items()},
        left_out=left_out,
        missing=missing,
        timeline=timeline,
        timeline_pictures={k: inline(f) for k, f in layer_figures(timeline).items()} if timeline else {},
        samples_picture=inline(samples_figure(timeline.samples)) if timeline and timeline.samples else None,
        layers_picture=inline(layers_figure(explained)) if explained else None,
    )


def _measures(evaluations: Iterable[EvaluationRecord]) -> list[Shown]:
    """Of all evaluations, against labels first."""
    found = dict.fromkeys(measure for evaluation in evaluations for measure in shown(evaluation.measures))
    return sorted(found, key=lambda measure: measure.close)
