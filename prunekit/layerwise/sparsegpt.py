"""SparseGPT: weights go column by column, and later ones make up for what went (Frantar & Alistarh 2023, arXiv 2301.00774).

Removing input ``j`` of an output, with inputs before it settled, costs ``w_j² / [H_F⁻¹]_jj`` with ``F`` the inputs from ``j`` on,
and the best change of the later weights is ``-w_j / [H_F⁻¹]_jj · [H_F⁻¹]_{j,F}`` (Hassibi & Stork 1992). Row ``j`` of the upper
Cholesky factor ``U`` of ``H⁻¹`` is ``[H_F⁻¹]_{j,F} / √[H_F⁻¹]_jj`` for every ``j`` at once, so that one factorisation serves all
outputs of a layer. What goes is chosen once for ``BLOCK`` columns, as they stand when their turn comes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.layerwise.amount import Amount
from prunekit.layerwise.method import Method, Problem, Solved, factored
from prunekit.plan.patterns import nm_mask

BLOCK = 128
"""Columns that are chosen from at a time, and whose errors reach the columns behind them in one product."""


def solve(problem: Problem, amount: Amount) -> Solved:
    weight = problem.weight.clone()
    keep = torch.ones_like(weight, dtype=torch.bool)
    factor = _inverse_factor(problem)
    for begin in range(0, weight.shape[2], BLOCK):
        end = min(begin + BLOCK, weight.shape[2])
        part, upper = (
            weight[:, :, begin:end],
            factor[:, begin:end, begin:end],
        )  # views of ``weight``
        keep[:, :, begin:end], errors = _swept(part, upper, amount, begin)
        weight[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return Solved(weight * keep, keep)


def _inverse_factor(problem: Problem) -> Tensor:
    """Upper ``U`` with ``UᵀU = H⁻¹``, ``(groups, d, d)``."""
    inverse = torch.cholesky_inverse(factored(problem.curvature(), problem.damping))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.to(problem.weight.dtype)


def _swept(part: Tensor, upper: Tensor, amount: Amount, begin: int) -> tuple[Tensor, Tensor]:
    """Columns of a block settled in place, the last's errors in those behind it inside the block.

    Returns:
        what stays of them, and each one's error over ``U_jj``, ``(groups, outputs, columns)`` both.
    """
    scale = upper.diagonal(dim1=1, dim2=2)
    pattern, width = amount.pattern, part.shape[2]
    if pattern is None:
        keep = amount.keep_some((part / scale[:, None]).square(), begin, begin + width)
    else:
        keep = torch.ones_like(part, dtype=torch.bool)
    errors = torch.zeros_like(part)
    for column in range(width):
        if pattern is not None and (begin + column) % pattern.second == 0:
            run = slice(column, min(column + pattern.second, width))
            worth = (part[:, :, run] / scale[:, None, run]).square()
            keep[:, :, run] = nm_mask(worth.flatten(0, 1), pattern.first, pattern.second).view(worth.shape)
        gone = torch.where(keep[:, :, column], 0, part[:, :, column]) / scale[:, column, None]
        errors[:, :, column] = gone
        part[:, :, column:] -= gone[:, :, None] * upper[:, column, None, column:]
    return keep, errors


METHOD = Method(solve, "products", "layer", changes=True, describes="column by column, later weights make up for earlier ones")
