"""A comparison over cases and seeds on one page that a reviewer can read alone, and its picture."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunekit.report.html import write_html
from prunekit.report.measures import deciding
from prunekit.report.paper.grid import made
from prunekit.report.plots import STYLES, inline
from prunekit.search.paper_table import DENSE, DENSE_TUNED, Lines, Measured, PaperTable, paper_tables
from prunekit.search.study import StudyRecord
from prunekit.search.summary import Curve, Measures, Row, Runs, only_sparsity, spread
from prunekit.task.evaluation import CLASSIFICATION

SHOWN = 5  # of the methods, the best areas; auto, magnitude and random beside them
BASELINES = ("magnitude", "random")
DENSE_LINES = {DENSE: "-", DENSE_TUNED: (0, (4, 2))}

Methods = Mapping[str, Sequence[str]]
Summary = Sequence[Mapping[str, Any]]


def study_figure(measured: Measured, summary: Summary) -> Figure:
    """A panel a case (rows) and table (columns): the deciding measure on test data over sparsity, mean over seeds.

    Bars are standard deviations over the seeds, as is what is shaded around auto and the dense model.
    """
    measure, tables = deciding(measured.measures), paper_tables(measured)
    cases = list(dict.fromkeys(entry["case"] for entry in summary))
    figure = Figure(figsize=(8.4 * len(tables), 2.9 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), len(tables), squeeze=False)
    for column, table in enumerate(tables):
        for panel, case in zip(axes[:, column], cases, strict=True):
            if case not in table.cases:
                panel.set_axis_off()
                continue
            if not table.epochs:
                _auto(panel, Runs(measured.rows, case, table.structure, measured.methods, measured.measures))
            _curves(panel, table, table.cases[case], set(measured.methods) if not table.epochs else set(table.names))
            panel.set_title(f"{case}, {table.structure}, {made(table)}", fontsize=10)
            panel.set_xlabel("sparsity asked for (%)", fontsize=8)
            panel.set_ylabel(f"test {measure.axis}", fontsize=8)
            panel.grid(alpha=0.25)
            panel.legend(
                fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False
            )  # beside the curves, never on them
    return figure


def _auto(panel: Axes, runs: Runs) -> None:
    curves: list[Curve] = [{s: row["test"][runs.first] for s, row in runs.auto(seed).items()} for seed in runs.seeds]
    x = sorted(curves[0])
    values = [[runs.scale * curve[s] for curve in curves] for s in x]
    mean, std = [statistics.fmean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    one = {"marker": ".", "markersize": 12} if len(x) == 1 else {}  # which a line does not show
    x = [100 * s for s in x]
    panel.plot(x, mean, color="black", linewidth=2, label="auto", **one)  # type: ignore[arg-type]
    _band(panel, x, mean, std)


def _band(panel: Axes, x: Sequence[float], mean: Sequence[float], std: Sequence[float]) -> None:
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, color="black", alpha=0.12, linewidth=0)


def _curves(panel: Axes, table: PaperTable, lines: Lines, names: set[str]) -> None:
    """The dense lines, the best of ``names`` by what they are behind the best on average, where measured, and the baselines."""
    sign = deciding(table.measures).sign
    own = {name: line for name, line in lines.items() if name in names and name not in DENSE_LINES}
    best: dict[float, float] = {}
    for line in own.values():
        for sparsity, entry in line.items():
            best[sparsity] = max(best.get(sparsity, -math.inf), sign * entry.mean)
    behind = {name: statistics.fmean(best[s] - sign * entry.mean for s, entry in line.items()) for name, line in own.items()}
    ranked = sorted(behind, key=lambda name: behind[name])
    for number, name in enumerate(dict.fromkeys([*ranked[:SHOWN], *(b for b in BASELINES if b in ranked)])):
        style, marker, colour = STYLES[number % len(STYLES)]
        points = sorted(lines[name].items())
        panel.errorbar(
            [100 * s for s, _ in points], [entry.mean for _, entry in points], yerr=[entry.std or 0.0 for _, entry in points],
            linestyle=style, marker=marker, color=colour, markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2,
            label=_short(name),
        )  # fmt: skip
    edges = [100 * s for s in (table.sparsities[0], table.sparsities[-1])]
    for name, style in DENSE_LINES.items():
        if name in lines:
            entry = next(iter(lines[name].values()))
            panel.axhline(entry.mean, color="black", linewidth=0.9, linestyle=style, label=name)
            _band(panel, edges, [entry.mean] * 2, [entry.std or 0.0] * 2)


def _short(method: str) -> str:
    """For a legend: options by their values alone, ``taylor(margin,l2)``."""
    return re.sub(r"\b(target|aggregation|share|group)=", "", method)


def write_study_page(path: Path, result: StudyRecord, measured: Measured) -> None:
    """What was run, on what, with what result, and what it cost.

    Args:
        result: what compare.json holds.
        measured: every measured model.
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
        layers=layers_table(measured.rows, result.summary, measured.methods, result.measures),
        picture=inline(study_figure(measured, result.summary)),
        only_sparsity=only_sparsity,
        dense_tuned={  # case -> the dense model's figure after the fine-tuning that pruned models get
            case: spread(list(figures.values()))
            for case, found in measured.dense.items()
            for epochs, figures in found.items()
            if epochs
        },
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
