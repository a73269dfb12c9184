"""Training seen along its own time: which layer moved the right answers when, and which sample was learned when."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from prunekit.explain.path import by_layer
from prunekit.explain.view import View, quantity

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
