"""What each step of training did to the outputs: ``φ_s(x) · U_s`` and ``φ_s(x) · R_s``, as a whole or by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels, to
from prunekit.kernel.attribution import SHARES
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.quadrature import get_rule
from prunekit.trajectory.layout import Layout
from prunekit.trajectory.trajectory import Segment


def step_scores(
    function: ModelFunction,
    segments: Iterable[Segment],
    x: Inputs,
    y: Labels,
    *,
    share: str = "kernel",
    only: Tensor | None = None,
    nodes: int = 1,
    rule: str = "midpoint",
    tick: Callable[[int], None] = lambda amount: None,
) -> Tensor:
    """Step-wise scores, ``(pieces, samples, targets)``; over kernel and regularisation they sum to ``f_N - f_0``.

    Args:
        share: as in ``attribute``.
        only: flat mask ``(P,)``: what these coordinates did, exactly, since the derivative along their part of a step is the
            sum of their parameter-wise scores; None for all.
        tick: called once per piece.
    """
    x, y = to(x, function.device), to(y, function.device)
    rows = []
    for segment in segments:
        start, end, moved = (v.to(function.device) for v in (segment.start, segment.end, SHARES[share](segment)))
        if only is not None:
            moved = moved * only.to(moved)
        slopes = [w * function.directional(torch.lerp(start, end, t), moved, x, y)[1] for t, w in get_rule(rule, nodes)]
        rows.append(torch.stack(slopes).sum(0))
        tick(1)
    return torch.stack(rows)


def layers_of(layout: Layout) -> dict[str, list[slice]]:
    """Layer -> where its coordinates lie; a parameter that belongs to no layer stands for itself."""
    found: dict[str, list[slice]] = {}
    for entry in layout:
        found.setdefault(entry.name.rpartition(".")[0] or entry.name, []).append(entry.span)
    return found


def layer_step_scores(
    function: ModelFunction,
    segments: Iterable[Segment],
    x: Inputs,
    y: Labels,
    weights: Tensor,
    *,
    shares: tuple[str, ...] = ("kernel", "regularisation"),
    nodes: int = 1,
    rule: str = "midpoint",
    into: Tensor | None = None,
    tick: Callable[[int], None] = lambda amount: None,
) -> Tensor:
    """Step-wise scores of one number, ``Σ_x Σ_c weights f``, by layer: ``(shares, pieces, layers)``, in ``layers_of``'s order.

    One backward pass a node gives all layers and shares at once. Summed over layers they are the weighted sums of
    ``step_scores``.

    Args:
        weights: ``(samples, targets)``.
        shares: as in ``attribute``.
        into: ``(shares, P)``, on the CPU; every coordinate's own scores, summed over pieces, are added to it.
        tick: called once per piece.
    """
    x, y, weights = to(x, function.device), to(y, function.device), weights.to(function.device)
    layers, rows = layers_of(function.layout), []
    for segment in segments:
        start, end = segment.start.to(function.device), segment.end.to(function.device)
        slope = torch.zeros_like(start)
        for node, weight in get_rule(rule, nodes):
            slope += weight * function.gradient(torch.lerp(start, end, node), x, y, weights)[1]
        moved = [SHARES[share](segment).to(slope) * slope for share in shares]
        sums = [torch.stack([torch.stack([v[span].sum() for span in spans]).sum() for spans in layers.values()]) for v in moved]
        rows.append(torch.stack(sums))
        if into is not None:
            for total, one in zip(into, moved, strict=True):
                total += one.to(total)
        tick(1)
    return torch.stack(rows, 1)
