"""ADMM: which weights stay is found together with their values, which are then solved for (ALPS: Meng et al. 2024, 2406.07831).

``min_v ½ (v - w)ᵀH(v - w)`` over ``v`` with few weights is split into a copy ``v`` that fits and a sparse copy ``z``, which a
growing penalty ``ρ/2 |v - z|²`` brings together. Inputs are scaled to norm 1 first, so that the largest entries of ``z`` are
those that matter. Once the places of ``z`` settle, its values are the least squares on these places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.layerwise.amount import Amount
from prunekit.layerwise.masked_solve import masked_least_squares
from prunekit.layerwise.method import Method, Problem, Solved, factored

STEPS = 300
"""At most; the penalty grows until places settle, long before that."""
EVERY = 3
"""Steps between two looks at how many places changed, which decides by how much the penalty grows."""
FIRST = 0.1
"""The first penalty, where inputs have norm 1."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(share of the places that stay, factor): more than so many changed, the penalty grows by so much."""


def solve(problem: Problem, amount: Amount) -> Solved:
    curvature = problem.curvature()
    scale = curvature.diagonal(dim1=1, dim2=2).sqrt()
    unit = curvature / (scale[:, :, None] * scale[:, None, :])
    dense = problem.weight * scale[:, None]
    wanted = dense @ unit
    keep = _places(dense, unit, wanted, amount, problem.damping)
    found = masked_least_squares(dense, keep, unit, wanted)
    return Solved(found / scale[:, None], keep)


def _places(dense: Tensor, unit: Tensor, wanted: Tensor, amount: Amount, damping: float) -> Tensor:
    """What stays, ``(groups, outputs, d)``."""
    factored(unit, damping)
    values, vectors = torch.linalg.eigh(unit)
    sparse, dual, penalty = dense, torch.zeros_like(dense), FIRST
    keep = seen = torch.zeros_like(dense, dtype=torch.bool)
    inverse = None
    for step in range(1, STEPS + 1):
        if inverse is None:
            inverse = (vectors / (values + penalty)[:, None]) @ vectors.transpose(1, 2)
        fitting = (wanted - dual + penalty * sparse) @ inverse
        free = fitting + dual / penalty
        keep = amount.keep(free.abs())
        sparse = free * keep
        dual = dual + penalty * (fitting - sparse)
        if step % EVERY == 0:
            changed = int((keep & ~seen).sum())
            if not changed:
                break
            share = changed / max(1, int(keep.sum()))
            penalty *= next(factor for least, factor in GROWTH if share > least)
            seen, inverse = keep, None
    return keep


METHOD = Method(solve, "products", "layer", changes=True, describes="places and values found together, values then solved for")
