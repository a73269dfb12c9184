"""The picture of pruned models: the deciding measure on test data over size, with error bars, and the dense model's line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.figure import Figure

from prunekit.explain import EvaluationRecord
from prunekit.report.measures import Shown, deciding
from prunekit.report.plots import STYLES, PlainNumbers
from prunekit.report.verdict import of_evaluation

Evaluations = Mapping[str, EvaluationRecord]


@dataclass(frozen=True)
class Point:
    """A pruned model: its size, its figure and the figure's error, in the measure's unit; None where that is not known."""

    label: str
    kept: int
    total: int
    figure: float
    error: float | None


def size_figure(runs: Mapping[str, Evaluations]) -> Figure:
    """A panel a measure. Models of one run have a mark each; of several runs, each run has one, and a dense line of its own.

    Sizes are shares of the dense model where all runs have the same number of parameters, else numbers, spaced logarithmically.

    Args:
        runs: evaluations by pruned model's name, by run's name; at least one in all.
    """
    runs = {name: evaluations for name, evaluations in runs.items() if evaluations}
    measures = list(dict.fromkeys(_measure(evaluations) for evaluations in runs.values()))
    shares = len({_dense(evaluations)["parameters"] for evaluations in runs.values()}) == 1
    figure = Figure(figsize=(6, 3.7 * len(measures)), layout="constrained")
    for panel, measure in zip(figure.subplots(len(measures), 1, squeeze=False)[:, 0], measures, strict=True):
        here = {name: evaluations for name, evaluations in runs.items() if _measure(evaluations) == measure}
        styles = cycle(STYLES)
        for name, evaluations in here.items():
            points = [_point(model, found, measure) for model, found in evaluations.items()]
            style = next(styles)
            for point in points:
                label = name if len(runs) > 1 else point.label
                _mark(panel, point, "_" if len(runs) > 1 and point is not points[0] else label, style, shares)
                style = next(styles) if len(runs) == 1 else style
            dense, line = _dense(evaluations), ("-", "black") if len(runs) == 1 else ("--", style[2])
            height = measure.scale * dense[measure.name]
            label = "dense model" if len(runs) == 1 else f"{name}, dense"
            panel.axhline(height, color=line[1], linestyle=line[0], linewidth=1.1, label=label)
        panel.set_ylabel(f"test {measure.axis}")
        panel.grid(alpha=0.25)
        panel.margins(y=0.12)
        if shares:
            panel.set_xlim(0, 103)
            panel.set_xlabel("size: parameters that stay (% of the dense model's)")
        else:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(PlainNumbers())
            panel.xaxis.set_minor_formatter(PlainNumbers())
            panel.set_xlabel("size: parameters that stay")
        panel.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure


def _mark(panel: object, point: Point, label: str, style: Sequence[object], shares: bool) -> None:
    x = 100 * point.kept / point.total if shares else max(1, point.kept)  # a logarithmic axis has no 0
    panel.errorbar(  # type: ignore[attr-defined]
        [x], [point.figure], yerr=None if point.error is None else [abs(point.error)], label=label, linestyle="none",
        marker=style[1], color=style[2], markersize=7, capsize=4, elinewidth=1.2,
    )  # fmt: skip


def _point(name: str, found: EvaluationRecord, measure: Shown) -> Point:
    verdict = of_evaluation(found)
    lost = verdict.lost.get("test", {"pruned": found.pruned[measure.name]})
    label = name + (f", on classes {', '.join(map(str, verdict.classes))}" if verdict.classes else "")
    return Point(label, verdict.kept, verdict.total, measure.scale * lost["pruned"], lost.get("standard_error"))


def _measure(evaluations: Evaluations) -> Shown:
    return deciding(next(iter(evaluations.values())).measures)


def _dense(evaluations: Evaluations) -> Mapping[str, float]:
    return next(iter(evaluations.values())).dense
