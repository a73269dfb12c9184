"""A comparison over cases and seeds on one page that a reviewer can read alone, and its picture."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prunekit.report.html import write_html
from prunekit.report.measures import deciding
from prunekit.report.plots import STYLES, inline
from prunekit.search.study import StudyRecord
from prunekit.search.summary import Curve, Measures, Row, Runs, spread
from prunekit.task.evaluation import CLASSIFICATION

SHOWN = 4  # of the methods, the best areas; auto, magnitude and random beside them
BASELINES = ("magnitude", "random")

Methods = Mapping[str, Sequence[str]]
Summary = Sequence[Mapping[str, Any]]


def study_figure(rows: Sequence[Row], summary: Summary, methods: Methods, measures: Measures = CLASSIFICATION) -> Figure:
    """A panel a case and structure: the deciding measure on test data over sparsity, mean over seeds, auto's standard deviation

    shaded."""
    measure = deciding(measures)
    cases = list(dict.fromkeys(entry["case"] for entry in summary))
    structures = list(dict.fromkeys(entry["structure"] for entry in summary))
    figure = Figure(figsize=(8.4 * len(structures), 2.9 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), len(structures), squeeze=False)
    for entry in summary:
        panel = axes[cases.index(entry["case"])][structures.index(entry["structure"])]
        runs = Runs(rows, entry["case"], entry["structure"], methods, measures)
        ranked = sorted(entry["methods"], key=lambda m: -measure.sign * entry["methods"][m]["mean"])
        shown = list(dict.fromkeys([*ranked[:SHOWN], *(b for b in BASELINES if b in ranked)]))
        autos: list[Curve] = [{s: row["test"][measure.name] for s, row in runs.auto(seed).items()} for seed in runs.seeds]
        x, mean, std = _band(autos, measure.scale)
        one = {"marker": ".", "markersize": 12} if len(x) == 1 else {}  # which a line does not show
        panel.plot(x, mean, color="black", linewidth=2, label="auto", **one)
        panel.fill_between(x, [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)],
                           color="black", alpha=0.12, linewidth=0)  # fmt: skip
        for number, method in enumerate(shown):
            chosen = [(seed, variant) for seed in runs.seeds if (variant := runs.chosen(seed, method)) is not None]
            x, mean, _ = _band([runs.curve(seed, variant) for seed, variant in chosen], measure.scale)
            line, marker, colour = STYLES[number % len(STYLES)]
            panel.plot(x, mean, linestyle=line, marker=marker, color=colour, markersize=4, linewidth=1.2, label=_short(method))
        panel.set_title(f"{entry['case']}, {entry['structure']}", fontsize=10)
        panel.set_xlabel("sparsity asked for (%)", fontsize=8)
        panel.set_ylabel(f"test {measure.axis}", fontsize=8)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)  # beside the curves, never on them
    return figure


def _short(method: str) -> str:
    """For a legend: options by their values alone, ``taylor(margin,l2)``."""
    return re.sub(r"\b(target|aggregation|share|group)=", "", method)


def _band(curves: Sequence[Curve], scale: float) -> tuple[list[float], list[float], list[float]]:
    x = sorted(curves[0])
    values = [[scale * curve[s] for curve in curves] for s in x]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return [100 * s for s in x], [statistics.fmean(v) for v in values], spreads


def write_study_page(path: Path, result: StudyRecord, rows: Sequence[Row], methods: Methods) -> None:
    """What was run, on what, with what result, and what it cost.

    Args:
        result: what compare.json holds.
        rows: every measured model.
        methods: name -> criteria that it stands for.
    """
    write_html(
        path,
        "study.html.j2",
        study=result.study,
        machine=result.machine,
        cost=result.cost,
        rows=result.rows,
        cases=cases_table(result.runs, result.measures),
        measure=deciding(result.measures),
        costs=costs_table(result.runs),
        summary=result.summary,
        tuned_methods=lambda tuned: list(dict.fromkeys((t["method"], t["repair"]) for t in tuned)),
        layers=layers_table(rows, result.summary, methods, result.measures),
        picture=inline(study_figure(rows, result.summary, methods, result.measures)),
    )


def cases_table(runs: Sequence[Mapping[str, Any]], measures: Measures = CLASSIFICATION) -> list[dict[str, Any]]:
    """One line a case: the dense model's figure on test data over seeds (in its unit), its size, and samples by split."""
    table, measure = [], deciding(measures)
    for case in dict.fromkeys(run["case"] for run in runs):
        mine = [run for run in runs if run["case"] == case]
        dense = mine[0]["dense"]
        table.append(
            {
                "case": case,
                "seeds": [run["seed"] for run in mine],
                "figure": spread(measure.scale * run["dense"]["test"][measure.name] for run in mine),
                "parameters": dense["parameters"],
                "macs": dense["macs"],
                "steps": mine[0]["steps"],
                "samples": mine[0]["samples"],
            }
        )
    return table


def costs_table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a criterion: seconds and gradient evaluations to score, means over all runs."""
    names = dict.fromkeys(name for run in runs for name in run["criteria"])
    table = []
    for name in names:
        costs = [run["criteria"][name] for run in runs if name in run["criteria"]]
        table.append(
            {
                "criterion": name,
                "seconds": statistics.fmean(c["seconds"] for c in costs),
                "evaluations": statistics.fmean(c.get("gradient_evaluations", 0) for c in costs),
            }
        )
    return table


def layers_table(
    rows: Sequence[Row], summary: Summary, methods: Methods, measures: Measures = CLASSIFICATION
) -> list[dict[str, Any]]:
    """Survivors by layer (first seed) of what auto took at the middle sparsity, with both compressions."""
    table = []
    for entry in summary:
        runs = Runs(rows, entry["case"], entry["structure"], methods, measures)
        auto = runs.auto(runs.seeds[0])
        sparsity = sorted(auto)[len(auto) // 2]
        row = auto[sparsity]
        table.append(
            {
                "case": entry["case"],
                "structure": entry["structure"],
                "sparsity": sparsity,
                "criterion": row["criterion"],
                "allocation": row["allocation"],
                "achieved": row["achieved"],
                "achieved_all": row["achieved_all"],
                "kept": row["kept"],
            }
        )
    return table
