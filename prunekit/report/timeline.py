"""Training seen along its own time: which layer moved the right answers when, and which sample was learned when."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from prunekit.report.explain import by_layer
from prunekit.report.plots import heat_map
from prunekit.report.view import View, quantity

SAMPLES = 40  # rows of the sample view
STRETCHES = 32  # its columns
PIECES = 200  # gradients along the path at most, so that a report stays quick; the residual tells what that costs


def timeline(view: View) -> dict[str, Any]:
    """Layer × phase and sample × stretch of training, as JSON values.

    ``layers``: what each layer's move did to the mean right answer (see ``View.own``), phase by phase, by step-wise scores;
    ``residual`` is what these leave unexplained of the change. ``samples``: how far each sample's own output moved in each
    stretch, which is the difference of ``f`` at its ends, so exact; ``learned``: the first stretch after which the answer is
    right and stays right, None if it never is. Without one class a sample ``samples`` is None, and ``quantity`` says what moved.
    """
    layers = by_layer(replace(view, stride=max(view.stride, -(-view.trajectory.pieces // PIECES))), view.own)
    ends = [view.values(view.trajectory.state(i)).double() for i in (0, -1)]
    change = float((view.own.double() * (ends[1] - ends[0])).sum())
    layers |= {"change": change, "residual": layers["kernel"] + layers["regularisation"] - change}
    told = {} if view.classifies else {"quantity": quantity(view), "note": view.about["note"]}
    return {"samples_seen": view.count, "layers": layers, "samples": _samples(view) if view.classifies else None, **told}


def _samples(view: View) -> dict[str, Any]:
    """Rows are ordered by label, then by number."""
    steps = len(view.trajectory)
    edges = sorted({round(k * steps / min(STRETCHES, steps)) for k in range(min(STRETCHES, steps) + 1)})
    chosen = sorted(range(min(SAMPLES, view.count)), key=lambda k: (int(view.labels[k]), k))
    values = [view.values(view.trajectory.state(s))[chosen].double().cpu() for s in edges]
    rows = []
    for row, number in enumerate(chosen):
        label = int(view.labels[number])
        outputs = [float(v[row, label]) for v in values]
        right = [int(v[row].argmax()) == label for v in values[1:]]
        first = next((k for k in range(len(right)) if all(right[k:])), None)
        rows.append(
            {"sample": number, "label": label, "answer": int(values[-1][row].argmax()), "learned": first,
             "moved": [b - a for a, b in pairwise(outputs)]}
        )  # fmt: skip
    return {"edges": edges, "rows": rows}


def layer_figures(found: dict[str, Any]) -> dict[str, Figure]:
    """Layer × phase: by gradients, and by weight decay and whatever else moved weights without data (if it did anything)."""
    rows = found["layers"]["rows"]
    times = [f"{p['begin']}–{p['end'] - 1}" for p in rows[0]["phases"]]
    names = [row["layer"] for row in rows]
    what = "moved the target by" if found.get("quantity") else "moved the right answers by"
    figures = {}
    for share in ("kernel", "regularisation"):
        values = [[p[share] for p in row["phases"]] for row in rows]
        if any(map(any, values)):
            figures[share] = heat_map(names, times, values, "training steps", what)
    return figures


def samples_figure(samples: dict[str, Any]) -> Figure:
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
