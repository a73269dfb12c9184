"""Scores with a sign, highest stays, as non-negative importances of the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.criteria.evidence import CriterionResult
from prunekit.criteria.scores import summed_axes
from prunekit.trajectory import Layout


def shifted(layout: Layout, scores: Tensor, prunable: Sequence[str], gradient_evaluations: int = 0) -> CriterionResult:
    """Importance ``s_i - min_j s_j``, in float64, so that the shift costs no weight its rank.

    Groups add up ``s_i`` and then the one constant ``Σ_j max(0, -s_j)`` over all coordinates, which no group can fall below
    (findings: ``shift``); their file holds ``<param>@<axis>``, ``(1, 1, axis size)``.

    Args:
        scores: ``s``, flat ``(P,)``.
    """
    flat = scores.double()
    views = layout.views(flat)
    lowest = min(float(views[name].min()) for name in prunable)
    axes: dict[str, Tensor] = {}
    negative = 0.0
    for entry in layout.parameters:
        value = views[entry.name]
        negative += float(value.clamp(max=0).neg().sum())
        for axis in summed_axes(value.dim()):
            others = [d for d in range(value.dim()) if d != axis]
            axes[f"{entry.name}@{axis}"] = (value.sum(others) if others else value.clone())[None, None]
    # A little more than the sum: groups add the same numbers in another order.
    shift = negative * (1 + 1e-9) if negative else 0.0
    importance = {name: views[name] - lowest for name in prunable}
    if not all(bool(torch.isfinite(value).all()) for value in importance.values()):
        importance = {name: views[name].clone() for name in prunable}  # refused as NaN or Inf, with the parameter's name
    return CriterionResult(importance, axes, {"shift": shift}, gradient_evaluations)
