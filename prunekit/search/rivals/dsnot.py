"""Grow and prune by each row's expected error: DSnoT, Dynamic Sparse no Training (Zhang et al., arXiv 2310.08915).

A row of a layer with weights w has lost ``e = Σ_{k removed} w_k E[a_k]`` of its expected output. A cycle

- gives back the removed weight of the largest ``sign(e) w_k E[a_k] / Var(a_k)``: it lowers |e| much, and by every sample;
- drops, of the kept weights whose going lowers |e| too (``sign(e) w_k E[a_k] < 0``), the one of the smallest ``|w_k| ‖a_k‖₂``
  (Wanda's);

and the row is done when |e| is small or no weight has the right sign. Sparsity of every row stays what the plan gave it.
The paper's 50 cycles and threshold of 0.1, in units of the layer's outputs. Linear and ungrouped convolutions; other layers
keep the plan's mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights
from prunekit.search.rivals.row_wise import Inputs, row_by_row

THRESHOLD = 0.1


def dsnot(pattern: Weights, objective: Objective, seed: int = 0, *, cycles: int = 50) -> Tensor:
    """The plan's mask after at most ``cycles`` cycles a row; no gradient is taken."""
    return row_by_row(pattern, objective, lambda weights, keep, inputs: grow_and_prune(weights, keep, inputs, cycles))


def grow_and_prune(weights: Tensor, keep: Tensor, inputs: Inputs, cycles: int = 50) -> Tensor:
    """Masks ``(rows, inputs)`` after the cycles of each row; float64."""
    expected, size = weights * inputs.mean, weights.abs() * inputs.norm
    variance = inputs.variance.clamp_min(torch.finfo(torch.float64).tiny)  # an input that never varies is given back first
    keep = keep.clone()
    for _ in range(cycles):
        error = (expected * ~keep).sum(1, keepdim=True)
        lowers = error.sign() * expected  # |e| by so much: given back if positive, dropped if negative
        back = (lowers / variance).masked_fill(keep | (lowers <= 0), -torch.inf).max(1)
        out = size.masked_fill(~keep | (lowers >= 0), torch.inf).min(1)
        rows = ((error[:, 0].abs() > THRESHOLD) & (back.values > -torch.inf) & (out.values < torch.inf)).nonzero()[:, 0]
        if not len(rows):
            break
        keep[rows, back.indices[rows]] = True
        keep[rows, out.indices[rows]] = False
    return keep
