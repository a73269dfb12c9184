"""Least squares with given zeros, for all outputs of a layer at once: no matrix is factored, an output costs a product a step."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 200
"""Of conjugate gradients, at most."""
TOLERANCE = 1e-4
"""Where the residual, measured in the preconditioner, has become this share of what it was."""


def masked_least_squares(
    start: Tensor, keep: Tensor, curvature: Tensor, wanted: Tensor, steps: int = STEPS, tolerance: float = TOLERANCE
) -> Tensor:
    """For every output the minimum of ``½ vᵀHv - bᵀv`` over ``v`` that is 0 where ``keep`` is False, ``(groups, outputs, d)``.

    Conjugate gradients preconditioned by H's diagonal, each output with steps of its own length (ALPS, arXiv 2406.07831, alg. 2).

    Args:
        start: where they begin, ``(groups, outputs, d)``.
        keep: of the same shape.
        curvature: ``H``, positive definite, ``(groups, d, d)``.
        wanted: ``b``, such as ``wH`` for the outputs of the weights ``w``, ``(groups, outputs, d)``.
        steps: at most.
        tolerance: an output is done where its residual is this small a share of ``b``'s, both on what stays.
    """
    inverse = curvature.diagonal(dim1=1, dim2=2).reciprocal()[:, None]
    found = start * keep
    residual = (wanted - found @ curvature) * keep
    direction = inverse * residual
    size = (residual * direction).sum(2, keepdim=True)
    enough = tolerance**2 * (wanted * keep * inverse * wanted).sum(2, keepdim=True)
    for _ in range(steps):
        open_ = size > enough
        if not bool(open_.any()):
            break
        turned = (direction @ curvature) * keep
        slope = (direction * turned).sum(2, keepdim=True)
        length = torch.where(open_ & (slope > 0), size / slope, 0)
        found = found + length * direction
        residual = residual - length * turned
        scaled = inverse * residual
        after = (residual * scaled).sum(2, keepdim=True)
        direction = scaled + torch.where(size > 0, after / size, 0) * direction
        size = after
    return found
