"""Edge-popup from magnitude: straight-through scores that know nothing of a mask (Ramanujan et al., arXiv 1911.13299).

Scores start at the magnitudes of a trained model, and gradients are those of the pruned model; otherwise it is
``prunekit.repair.learn``, with the same steps, and the best mask on the accept part is taken.
"""

from __future__ import annotations

from torch import Tensor

from prunekit.repair.learn import learnt_masks
from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights


def edge_popup(pattern: Weights, objective: Objective, seed: int = 0, *, steps: int = 300) -> Tensor:
    """The mask of the lowest divergence on the accept part."""
    size = pattern.magnitude(objective.theta)
    keep = pattern.select(size)
    lowest = objective.on_accept(pattern.expand(keep.to(objective.theta.dtype)))
    for _, candidate in learnt_masks(pattern, objective, size, steps=steps, seed=seed, begin=1.0):
        value = objective.on_accept(pattern.expand(candidate.to(objective.theta.dtype)))
        if value < lowest:
            keep, lowest = candidate, value
    return keep
