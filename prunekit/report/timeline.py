"""Pictures of training along its own time (``prunekit.explain.timeline``)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from matplotlib.figure import Figure

from prunekit.explain.timeline import Samples, Timeline
from prunekit.report.plots import heat_map

SHARES: tuple[Literal["kernel"], Literal["regularisation"]] = ("kernel", "regularisation")


def layer_figures(found: Timeline) -> dict[str, Figure]:
    """Layer × phase, a picture a share; none of a share that moved nothing."""
    rows = found.layers["rows"]
    times = [f"{p['begin']}–{p['end'] - 1}" for p in rows[0]["phases"]]
    names = [row["layer"] for row in rows]
    what = "moved the target by" if found.quantity else "moved the right answers by"
    figures: dict[str, Figure] = {}
    for share in SHARES:
        values = [[p[share] for p in row["phases"]] for row in rows]
        if any(map(any, values)):
            figures[share] = heat_map(names, times, values, "training steps", what)
    return figures


def samples_figure(samples: Samples) -> Figure:
    """Sample × stretch of training; a dot where the answer became right for good."""
    rows = samples["rows"]
    times = [f"{a}–{b - 1}" for a, b in pairwise(samples["edges"])]
    names = [
        f"{row['sample']}: {row['label']}" + ("" if row["answer"] == row["label"] else f" (answers {row['answer']})")
        for row in rows
    ]
    figure = heat_map(names, times, [row["moved"] for row in rows], "training steps", "moved its right answer by")
    panel = figure.axes[0]
    learned = [(row["learned"], place) for place, row in enumerate(rows) if row["learned"] is not None]
    if learned:
        panel.plot(*zip(*learned, strict=True), linestyle="none", marker="o", color="black", markersize=3.5)
    panel.set_ylabel("sample: label")
    figure.set_size_inches(9, 1.2 + 0.17 * len(rows))
    panel.tick_params(axis="y", labelsize=6)
    return figure
