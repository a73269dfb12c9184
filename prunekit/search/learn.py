"""Masks learnt by straight-through scores, from any mask.

A score a unit, started at ``magnitude / scale × (0.3 + m)``; the model runs with the top k, and the gradient of
its divergence with respect to the mask goes straight to the scores (edge-popup: Ramanujan et al., arXiv 1911.13299).
The scale is the magnitudes' standard deviation, or what it would be for normal weights of the same mean if that is more:
sizes of channels differ so little that their deviation would put kept and removed ones out of each other's reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prunekit.search.objective import Objective
from prunekit.search.patterns import Pattern

NORMAL = (math.pi / 2 - 1) ** 0.5  # standard deviation over mean of |x| for normal x
HEAD_START = 0.3  # of a removed unit; a kept one has 1.3


def learnt_masks(
    pattern: Pattern, objective: Objective, keep: Tensor, *, steps: int = 300, lr: float = 0.02, every: int = 5, seed: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """``(step, mask (U,))`` every few steps of Adam on the scores; the caller judges the masks and may stop.

    A step sees all samples to learn from when they fit one or two batches, else one batch drawn at random.

    Args:
        keep: the mask to begin with, ``(U,)``.
    """
    theta, function = objective.theta, objective.function
    size = pattern.magnitude(theta)
    scale = torch.maximum(size.std(correction=0), NORMAL * size.mean()).clamp_min(1e-30)
    scores = size / scale * (HEAD_START + keep.to(size.dtype))
    optimizer = torch.optim.Adam([scores], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    few = len(objective.learn) <= 2
    for step in range(1, steps + 1):
        mask = pattern.select(scores).to(theta.dtype).requires_grad_()
        one = [objective.learn[int(torch.randint(len(objective.learn), (1,), generator=generator))]]
        batches = objective.learn if few else one
        samples = sum(len(x) for x, _ in batches)
        gradient = torch.zeros_like(mask)
        for x, y in batches:
            value = function(theta * pattern.expand(mask), x, y).sum() / samples
            gradient += torch.autograd.grad(value, mask)[0]
        scores.grad = gradient
        optimizer.step()
        if step % every == 0 or step == steps:
            yield step, pattern.select(scores)
