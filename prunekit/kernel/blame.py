"""Which removed weights a mean over samples rose through: one straight segment, one backward pass of the mean a node.

For ``J(θ) = mean_n Σ_targets f(x_n; θ)`` and a straight segment θ → θ + D,

    J(θ + D) - J(θ) = Σ_i blame_i,     blame_i = D_i ∫_0^1 ∂_i J(θ + t D) dt

which is the mean over samples of what ``attribute`` gives for the same segment and nodes, without a gradient per sample.
Pruning is the segment from the dense weights to the masked ones (``D_i = -θ_i`` where a weight goes, 0 elsewhere).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Batch, Inputs, Labels, size, to
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.gradients import MomentEngine, choose_engine
from prunekit.kernel.quadrature import get_rule
from prunekit.trajectory.trajectory import Segment


class Batches(Protocol):
    """Inputs and labels (or whatever the function's target takes in their place), as often as they are looked at.

    Where they say ``dealt``, they are this rank's part (``prunekit.ranks``), ``samples`` is how many all ranks have together, and
    sums over them are added up.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Blame:
    """``values`` ``(P,)``: blame of every coordinate; ``change``: ``J(end) - J(start)``, exact; ``residual``: what the

    quadrature leaves unexplained, ``change - values.sum()``.
    """

    values: Tensor
    change: float
    residual: float


def blame(function: ModelFunction, segment: Segment, batches: Batches, *, nodes: int = 8, rule: str = "midpoint") -> Blame:
    """Blame of every coordinate for the change of the mean along ``segment``; ``nodes`` backward passes of the mean."""
    start, end = segment.start.to(function.device), segment.end.to(function.device)
    slope = torch.zeros_like(start)
    for node, weight in get_rule(rule, nodes):
        slope.add_(mean_gradient(function, torch.lerp(start, end, node), batches)[1], alpha=weight)
    values = slope * (end - start)
    change = mean_value(function, end, batches) - mean_value(function, start, batches)
    return Blame(values, change, change - float(values.double().sum()))


@torch.no_grad()
def mean_value(function: ModelFunction, theta: Tensor, batches: Batches) -> float:
    """``J(θ)``: the mean over all samples of their targets' sum."""
    total, samples = 0.0, 0
    for x, y in batches:
        total += float(function(theta, to(x, function.device), to(y, function.device)).double().sum())
        samples += size(x)
    add_up(batches, found := torch.tensor([total, samples], dtype=torch.float64))
    return float(found[0] / found[1])


def add_up(batches: Batches, *sums: Tensor) -> None:
    """Adds up over all ranks what was summed over batches, in place, where each rank had its part of them."""
    if getattr(batches, "dealt", False):
        ranks.add_up(sums)


def samples_in(batches: Batches) -> int:
    """How many samples the batches hold."""
    known = getattr(batches, "samples", None)
    return known if isinstance(known, int) else sum(size(x) for x, _ in batches)


def mean_gradient(function: ModelFunction, theta: Tensor, batches: Batches) -> tuple[float, Tensor]:
    """``J(θ)`` and its gradient ``(P,)``; one batch's activations are held at a time."""
    samples = samples_in(batches)
    value, gradient = 0.0, torch.zeros_like(theta)
    for x, y in batches:
        values, part = mean_of_batch(function, theta, x, y, samples)
        gradient.add_(part)
        value += values
    add_up(batches, found := torch.tensor([value], dtype=torch.float64), gradient)
    return float(found), gradient


def mean_of_batch(function: ModelFunction, theta: Tensor, x: Inputs, y: Labels, samples: int) -> tuple[float, Tensor]:
    """One batch's part of the mean over ``samples``, and its gradient ``(P,)``."""
    x, y = to(x, function.device), to(y, function.device)
    share = theta.new_full((), 1 / samples)
    values, gradient = function.gradient(theta, x, y, share)
    return float(values.sum() / samples), gradient


def second_moments(function: ModelFunction, theta: Tensor, batches: Batches, engine: MomentEngine | None = None) -> Tensor:
    """``Σ_n Σ_targets (∂_i f(x_n; θ))²`` of every coordinate, ``(P,)``; 0 for buffers.

    Per-sample gradients are not held for linear layers on vectors, whose sum is ``(G²)ᵀ(A²)``; other layers form them a
    block of samples at a time (as many multiplications as a plain backward pass, and one square a weight and sample).

    Args:
        engine: from ``choose_engine(function, …)``, to choose it only once.
    """
    if engine is None:
        engine = choose_engine(function, theta, *to(batches[0], function.device))
    total = torch.zeros_like(theta)
    views = function.layout.views(total)
    for x, y in batches:
        for name, squares in engine.squares(theta, to(x, function.device), to(y, function.device)).items():
            views[name].add_(squares)
    add_up(batches, total)
    return total
