"""Which removed weights a mean over samples rose through: one straight segment, one backward pass of the mean a node.

For ``J(θ) = mean_n Σ_targets f(x_n; θ)`` and a straight segment θ → θ + D,

    J(θ + D) - J(θ) = Σ_i blame_i,     blame_i = D_i ∫_0^1 ∂_i J(θ + t D) dt

which is the mean over samples of what ``attribute`` gives for the same segment and nodes, without a gradient per sample.
Pruning is the segment from the dense weights to the masked ones (``D_i = -θ_i`` where a weight goes, 0 elsewhere).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.kernel.function import ModelFunction
from prunekit.kernel.gradients import MomentEngine, choose_engine
from prunekit.kernel.quadrature import get_rule
from prunekit.trajectory.trajectory import Segment

Batches = Sequence[tuple[Tensor, Tensor]]
"""Inputs and labels (or whatever the function's target takes in their place), on the function's device."""


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
    total = sum(float(function(theta, x, y).double().sum()) for x, y in batches)
    return total / sum(len(x) for x, _ in batches)


def mean_gradient(function: ModelFunction, theta: Tensor, batches: Batches) -> tuple[float, Tensor]:
    """``J(θ)`` and its gradient ``(P,)``; one batch's activations are held at a time."""
    theta = theta.detach().requires_grad_()
    samples = sum(len(x) for x, _ in batches)
    value, gradient = 0.0, torch.zeros_like(theta)
    for x, y in batches:
        part = function(theta, x, y).sum() / samples
        gradient.add_(torch.autograd.grad(part, theta)[0])
        value += float(part.detach())
    return value, gradient.detach()


def second_moments(function: ModelFunction, theta: Tensor, batches: Batches, engine: MomentEngine | None = None) -> Tensor:
    """``Σ_n Σ_targets (∂_i f(x_n; θ))²`` of every coordinate, ``(P,)``; 0 for buffers.

    Per-sample gradients are not held for linear layers on vectors, whose sum is ``(G²)ᵀ(A²)``; other layers form them a
    block of samples at a time (as many multiplications as a plain backward pass, and one square a weight and sample).

    Args:
        engine: from ``choose_engine(function, …)``, to choose it only once.
    """
    if engine is None:
        engine = choose_engine(function, theta, *batches[0])
    total = torch.zeros_like(theta)
    views = function.layout.views(total)
    for x, y in batches:
        for name, squares in engine.squares(theta, x, y).items():
            views[name].add_(squares)
    return total
