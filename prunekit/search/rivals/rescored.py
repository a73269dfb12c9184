"""Rescoring while the mask shrinks: tempered per-sample importance, once or in steps (as SNIP became FORCE and SynFlow).

Steps remove the same share of what is left each time (de Jorge et al., arXiv 2006.09081); importances are those of the
model as it is by then. Each step costs one gradient of every sample to learn from, and by default there are as many steps as
``refine`` takes such gradients by its own defaults: rivals at equal cost, as ``prunekit.search.rivals.evaluations`` counts it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.repair.limits import best
from prunekit.repair.objective import Objective
from prunekit.repair.refine import RefineOptions
from prunekit.repair.swaps import Weights

TEMPER = 0.5


def tempered(pattern: Weights, objective: Objective, seed: int = 0) -> Tensor:
    """One step: ``|θ|^½ (Σ_n (θ ∂f_n)²)^¼`` of the dense model."""
    return rescored(pattern, objective, seed, steps=1)


def rescored(pattern: Weights, objective: Objective, seed: int = 0, *, steps: int | None = None) -> Tensor:
    """The mask after ``steps`` steps from the dense model to the pattern's count; None: ``equal_cost``."""
    theta = objective.theta
    engine = objective.engine()
    steps = equal_cost(len(objective.learn)) if steps is None else steps
    keep = torch.ones_like(pattern.keep)
    for step in range(1, steps + 1):
        now = theta * pattern.expand(keep.to(theta.dtype))
        influence = pattern.influence(objective.ranking, engine, now, objective.labelled)
        worth = influence.pow(TEMPER) * pattern.magnitude(theta).pow(1 - TEMPER)
        share = (max(pattern.count, 1) / len(keep)) ** (step / steps)
        count = pattern.count if step == steps else max(pattern.count, round(share * len(keep)))
        keep = best(worth.masked_fill(~keep, -torch.inf), count)
    return keep


def equal_cost(batches: int = 1) -> int:
    """Gradients of every sample to learn from that ``refine`` takes by its defaults, learning and all rounds of swaps.

    Learning: the importances that scores start at, and a gradient a step (of one of the ``batches`` where there are more than
    two). Swaps: importances in every round; blame's nodes in every odd one, one gradient of the gain in every even one.
    """
    defaults = RefineOptions()
    rounds, nodes, steps = defaults.rounds, defaults.nodes, defaults.steps
    learning = 1 + (steps if batches <= 2 else round(steps / batches))
    return learning + rounds + (rounds + 1) // 2 * nodes + rounds // 2
