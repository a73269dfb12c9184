"""Masks learnt by straight-through scores, along the pruning path.

A score a unit; the top k are kept, and the gradient with respect to the mask goes straight to the scores (edge-popup:
Ramanujan et al., arXiv 1911.13299). It is taken not at the pruned model alone but on the straight segment that leads there from
the dense one, at ``θ_N + t (θ_P - θ_N)`` with t rising from ``begin`` to 1 over the first half: the integrand of blame, at one
node a step. A mask that is far from right leaves a model whose own gradients say little about what it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels
from prunekit.kernel import samples_in
from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Swaps

NORMAL = (math.pi / 2 - 1) ** 0.5  # standard deviation over mean of |x| for normal x
BEGIN = 0.5


def learnt_masks(
    swaps: Swaps,
    objective: Objective,
    worth: Tensor,
    *,
    steps: int = 300,
    lr: float = 0.02,
    every: int = 5,
    seed: int = 0,
    begin: float = BEGIN,
) -> Iterator[tuple[int, Tensor]]:
    """``(step, mask (U,))`` every few steps of Adam on the scores; the caller judges the masks and may stop.

    A step sees all samples to learn from when they fit one or two batches, else one batch drawn at random.

    Args:
        worth: where the scores start, ``(U,)``, 0 or more, on any scale: it is divided by its standard deviation, or by what
            that would be for normal values of the same mean if that is more (sizes of channels differ so little that their
            deviation would put kept and removed ones out of each other's reach).
        begin: t of the first step; 1 is edge-popup.
    """
    theta = objective.theta
    scale = torch.maximum(worth.std(correction=0), NORMAL * worth.mean()).clamp_min(1e-30)
    scores = worth / scale
    optimizer = torch.optim.Adam([scores], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    few = len(objective.learn) <= 2
    for step in range(1, steps + 1):
        t = min(1.0, begin + 2 * (1 - begin) * step / steps)
        kept = swaps.select(scores).to(theta.dtype)
        mask = torch.lerp(torch.ones_like(kept), kept, t).requires_grad_()
        one = [objective.learn[int(torch.randint(len(objective.learn), (1,), generator=generator))]]
        batches = objective.learn if few else one
        samples = samples_in(batches)
        gradient = torch.zeros_like(mask)
        for x, y in batches:
            gradient += mask_gradient(objective, swaps, mask, x, y, samples)
        scores.grad = gradient
        optimizer.step()
        if step % every == 0 or step == steps:
            yield step, swaps.select(scores)


def mask_gradient(objective: Objective, swaps: Swaps, mask: Tensor, x: Inputs, y: Labels, samples: int) -> Tensor:
    """One batch's part of ``∂J/∂mask`` ``(U,)``, ``J`` the mean over ``samples``; ``mask`` requires a gradient."""
    point = objective.theta * swaps.expand(mask)
    share = point.new_full((), 1 / samples)
    gradient = objective.function.gradient(point.detach(), x, y, share)[1]
    return torch.autograd.grad(point, mask, gradient)[0]
