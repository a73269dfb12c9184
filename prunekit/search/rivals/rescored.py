"""Rescoring while the mask shrinks: tempered per-sample importance, once or in steps (as SNIP became FORCE and SynFlow).

Steps remove the same share of what is left each time (de Jorge et al., arXiv 2006.09081); importances are those of the
model as it is by then. Each step costs one per-sample pass; ``STEPS`` gives it the gradient evaluations of 30 rounds of
refining (15 of 8 blame nodes, 15 of one gain, 30 importances), as ``prunekit.search.rivals.evaluations`` counts them too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.kernel.gradients import choose_engine
from prunekit.search.limits import best
from prunekit.search.objective import Objective
from prunekit.search.patterns import Weights

STEPS = 165
TEMPER = 0.5


def tempered(pattern: Weights, objective: Objective, seed: int = 0) -> Tensor:
    """One step: ``|θ|^½ (Σ_n (θ ∂f_n)²)^¼`` of the dense model."""
    return rescored(pattern, objective, seed, steps=1)


def rescored(pattern: Weights, objective: Objective, seed: int = 0, *, steps: int = STEPS) -> Tensor:
    """The mask after ``steps`` steps from the dense model to the pattern's count."""
    theta = objective.theta
    engine = choose_engine(objective.ranking, theta, *objective.labelled[0])
    keep = torch.ones_like(pattern.keep)
    for step in range(1, steps + 1):
        now = theta * pattern.expand(keep.to(theta.dtype))
        influence = pattern.influence(objective.ranking, engine, now, objective.labelled)
        worth = influence.pow(TEMPER) * pattern.magnitude(theta).pow(1 - TEMPER)
        share = (max(pattern.count, 1) / len(keep)) ** (step / steps)
        count = pattern.count if step == steps else max(pattern.count, round(share * len(keep)))
        keep = best(worth.masked_fill(~keep, -torch.inf), count)
    return keep
