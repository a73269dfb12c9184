"""Training seen along its own time: which layer moved the right answers when, and which sample was learned when."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, TypedDict

from prunekit.artifact import SOMETIMES, Artifact
from prunekit.explain.path import by_layer
from prunekit.explain.view import View, quantity

SAMPLES = 40  # rows of the sample view
STRETCHES = 32  # its columns
PIECES = 200  # gradients along the path at most, so that a report stays quick; the residual tells what that costs


class Phase(TypedDict):
    """A stretch of training steps, and what gradients and everything else did in it."""

    begin: int
    end: int
    kernel: float
    regularisation: float


class LayerRow(TypedDict):
    layer: str
    phases: list[Phase]


class Layers(TypedDict):
    """Rows by layer; their sums by share; the change that they explain, and what they leave of it."""

    rows: list[LayerRow]
    kernel: float
    regularisation: float
    change: float
    residual: float


class SampleRow(TypedDict):
    """How far a sample's own output moved in each stretch; ``learned``: see ``Timeline``."""

    sample: int
    label: int
    answer: int
    learned: int | None
    moved: list[float]


class Samples(TypedDict):
    """Rows by sample; ``edges`` are the steps at which a stretch ends and the next begins."""

    edges: list[int]
    rows: list[SampleRow]


@dataclass(frozen=True, kw_only=True)
class Timeline(Artifact):
    """timeline.json: layer × phase and sample × stretch of training.

    Attributes:
        made_from: the trajectory, and what identifies the view.
        samples_seen: how many samples were looked at.
        layers: what each layer's move did to the mean right answer (see ``View.own``), phase by phase, by step-wise scores;
            ``residual`` is what these leave unexplained of the change.
        samples: how far each sample's own output moved in each stretch, which is the difference of ``f`` at its ends, so exact;
            ``learned`` is the first stretch after which the answer is right and stays right, None if it never is. None without
            one class a sample.
        quantity, note: what moved, and why samples are not shown, where there is not one class a sample.
    """

    KIND: ClassVar[str] = "timeline"
    CALLED: ClassVar[str] = "timeline"

    made_from: dict[str, Any]
    samples_seen: int
    layers: Layers
    samples: Samples | None
    quantity: str | None = field(default=None, metadata=SOMETIMES)
    note: str | None = field(default=None, metadata=SOMETIMES)

    def check(self) -> None:
        """There are layers, whose phases are the same, and every sample has its move in every stretch."""
        if len({len(row["phases"]) for row in self.layers["rows"]}) != 1:
            raise ValueError("layers.rows must have the same phases")
        if self.samples is not None:
            stretches = len(self.samples["edges"]) - 1
            if any(len(row["moved"]) != stretches for row in self.samples["rows"]):
                raise ValueError(f"samples.rows must have {stretches} stretches each")


def sources(view: View) -> dict[str, Any]:
    """What a timeline of this view is made from."""
    return {"trajectory": view.trajectory.hash, **view.facts}


def timeline(view: View) -> Timeline:
    """Follows layers and samples along the path of a recorded training."""
    layers = by_layer(replace(view, stride=max(view.stride, -(-view.trajectory.pieces // PIECES))), view.own)
    ends = [view.values(view.trajectory.state(i)).double() for i in (0, -1)]
    change = float((view.own.double() * (ends[1] - ends[0])).sum())
    return Timeline(
        made_from=sources(view),
        samples_seen=view.count,
        layers={
            "rows": layers["rows"],
            "kernel": layers["kernel"],
            "regularisation": layers["regularisation"],
            "change": change,
            "residual": layers["kernel"] + layers["regularisation"] - change,
        },
        samples=_samples(view) if view.classifies else None,
        quantity=None if view.classifies else quantity(view),
        note=None if view.classifies else view.about["note"],
    )


def _samples(view: View) -> Samples:
    """Rows are ordered by label, then by number."""
    steps = len(view.trajectory)
    edges = sorted({round(k * steps / min(STRETCHES, steps)) for k in range(min(STRETCHES, steps) + 1)})
    chosen = sorted(range(min(SAMPLES, view.count)), key=lambda k: (int(view.labels[k]), k))
    values = [view.values(view.trajectory.state(s))[chosen].double().cpu() for s in edges]
    rows: list[SampleRow] = []
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
