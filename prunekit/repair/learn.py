"""Masks learnt by straight-through scores: along the pruning path from samples that are kept, or from a stream of fresh ones.

From kept samples the gradient is taken not at the pruned model alone but on the straight segment that leads there from the dense
one, at ``θ_N + t (θ_P - θ_N)`` with t rising from ``begin`` to 1 over the first half: the integrand of blame, at one node a step.
A mask that is far from right leaves a model whose own gradients say little about what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels
from prunekit.repair.learner import Learner
from prunekit.repair.live import Live
from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Swaps

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
        worth: where the scores start, see ``Learner``.
        begin: t of the first step; 1 is edge-popup.
    """
    live = Live(objective.function, objective.function.layout.views(objective.theta), swaps.scaled())
    learner = Learner(swaps, live, worth.clone())
    generator = torch.Generator().manual_seed(seed)
    few = len(objective.learn) <= 2
    for step in range(1, steps + 1):
        t = min(1.0, begin + 2 * (1 - begin) * step / steps)
        drawn = int(torch.randint(len(objective.learn), (1,), generator=generator))
        batches = list(objective.learn) if few else objective.learn.one(drawn)
        learner.step(batches, objective.learn.samples if few else objective.learn.size(drawn), lr, t)
        if step % every == 0 or step == steps:
            yield step, learner.masks()


def mask_gradient(objective: Objective, swaps: Swaps, mask: Tensor, x: Inputs, y: Labels, samples: int) -> Tensor:
    """One batch's part of ``∂J/∂mask`` ``(U,)``, ``J`` the mean over ``samples``; ``mask`` requires a gradient."""
    point = objective.theta * swaps.expand(mask)
    share = point.new_full((), 1 / samples)
    gradient = objective.function.gradient(point.detach(), x, y, share)[1]
    return torch.autograd.grad(point, mask, gradient)[0]
