"""What coordinates do to outputs along the training path: in all, by step, by layer.

Explanations are one quantity summed in different ways: how far coordinates moved an output along the path,
``∫ ∇f · (mask ⊙ dθ)`` (ExPLAIND, arXiv 2505.20076; docs/kernel.md). A mask gives a part, a piece of the path gives the time,
the data-wise recursion gives training samples, and the pruning is a piece of the path as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from prunekit.explain.view import View
from prunekit.kernel import layer_step_scores, layers_of
from prunekit.progress import Bar
from prunekit.trajectory import Segment

SCHEMA = 1  # of explanations
PHASES = 12
JUMP_NODES = 32  # a pruning is one long piece with kinks in it
DOUBLED = 8  # pieces on which the nodes are doubled, to know the error of a part's own sums


@dataclass(frozen=True)
class PrunedPath:
    """How a pruned model came from the dense one.

    Attributes:
        name: of the pruned model.
        keep: flat ``(P,)`` of bool, False where the plan removes.
        units: group -> ``(units,)`` of bool, False where one goes; empty for plans of single weights.
        jumps: the pieces in which weights were set: the pruning, in steps where a schedule made it so.
        end: its weights in dense coordinates, ``(P,)``, fine-tuned or not.
    """

    name: str
    keep: Tensor
    units: Mapping[str, Tensor]
    jumps: tuple[Segment, ...]
    end: Tensor


@dataclass(frozen=True)
class Trace:
    """A mask followed along the path: sums over it ``(samples, targets)``, by step, and how far to trust them."""

    kernel: Tensor
    regularisation: Tensor
    start: Tensor
    steps: dict[str, Any]
    certificate: dict[str, Any]


def trace(view: View, mask: Tensor | None) -> Trace:
    """Follows the coordinates of ``mask`` (None: all) along the path: one directional derivative a step and share."""
    weights = view.own
    value = start = view.values(view.trajectory.state(0)).double()
    rebuilt = start.clone()
    sums = {"kernel": torch.zeros_like(start), "regularisation": torch.zeros_like(start)}
    series: dict[str, list[float]] = {"kernel": [], "regularisation": []}
    firsts, by_class, residuals, off = [], [], [], [0.0, 0.0]
    doubled = set(range(0, view.pieces, max(1, view.pieces // DOUBLED)))
    with Bar("along the path (steps)", view.pieces) as bar:
        for number, segment in enumerate(view.segments()):
            both = torch.zeros_like(start)
            for share, moved in (("kernel", segment.data_update), ("regularisation", segment.regularisation)):
                one = torch.zeros_like(start)
                if bool((moved if mask is None else moved[mask.cpu()]).any()):
                    one = view.moved(segment, share, mask)
                    if share == "kernel" and number in doubled:
                        fine = view.moved(segment, share, mask, 2 * view.nodes)
                        off = [off[0] + float((fine - one).abs().sum()), off[1] + float(fine.abs().sum())]
                sums[share] += one
                series[share].append(summed(weights, one))
                both += one
            after = view.values(segment.end).double()
            change = both if mask is None else view.moved(segment, "whole", None)
            residuals.append(float((change - (after - value)).abs().mean()))
            rebuilt, value = rebuilt + change, after
            firsts.append(segment.index)
            by_class.append([own for _, own, _ in view.classes(both)])
            bar.advance()
    steps = {
        "first": firsts, **series, "classes": [c for c, _, _ in view.classes(start)], "by_class": by_class,
        "half_by": half_by(firsts, [a + b for a, b in zip(series["kernel"], series["regularisation"], strict=True)]),
        "phases": phases(firsts, len(view.trajectory), series),
    }  # fmt: skip
    certificate = {
        "mean_error": float((rebuilt - value).abs().mean()), "max_error": float((rebuilt - value).abs().max()),
        "mean_output": float(value.abs().mean()), "total": sum(residuals),
        "worst_step": firsts[max(range(len(residuals)), key=residuals.__getitem__)], "worst": max(residuals),
        "part_error": off[0] / off[1] if off[1] else 0.0, "nodes": view.nodes, "rule": view.rule,
    }  # fmt: skip
    return Trace(sums["kernel"], sums["regularisation"], start, steps, certificate)


def phases(firsts: Sequence[int], steps: int, series: Mapping[str, Sequence[float]], count: int = PHASES) -> list[dict[str, Any]]:
    """Stretches of training of the same length, each with the sums of ``series`` inside."""
    count = min(count, len(firsts))
    edges = [round(k * len(firsts) / count) for k in range(count + 1)]
    return [
        {
            "begin": firsts[a], "end": firsts[b] if b < len(firsts) else steps,
            **{name: float(sum(values[a:b])) for name, values in series.items()},
        }
        for a, b in pairwise(edges)
    ]  # fmt: skip


def by_layer(view: View, weights: Tensor, into: Tensor | None = None) -> dict[str, Any]:
    """The weighted sum's step-wise scores by layer: ``layers``, ``first`` steps, and ``(layers, phases)`` sums of both shares.

    Args:
        into: ``(2, P)``; each coordinate's kernel and regularisation share are added to it.
    """
    firsts: list[int] = []

    def noted() -> Iterator[Segment]:
        for segment in view.segments():
            firsts.append(segment.index)
            yield segment

    with Bar("layers along the path (steps)", view.pieces) as bar:
        scores = layer_step_scores(
            view.function, noted(), view.x, view.y, weights, nodes=view.nodes, rule=view.rule, into=into, tick=bar.advance
        ).double()
    names = list(layers_of(view.trajectory.layout))
    rows = []
    for k, name in enumerate(names):
        series = {"kernel": scores[0, :, k].tolist(), "regularisation": scores[1, :, k].tolist()}
        rows.append({"layer": name, "phases": phases(firsts, len(view.trajectory), series)})
    return {"rows": rows, "kernel": float(scores[0].sum()), "regularisation": float(scores[1].sum())}


def summed(weights: Tensor, values: Tensor) -> float:
    return float((weights.double() * values).sum())


def half_by(firsts: Sequence[int], series: Sequence[float]) -> int:
    """The step by which half of the movement, up and down, was done."""
    total, so_far = sum(map(abs, series)), 0.0
    for first, value in zip(firsts, series, strict=True):
        so_far += abs(value)
        if so_far >= total / 2:
            return first
    return firsts[-1]
