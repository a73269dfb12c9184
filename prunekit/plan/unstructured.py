"""Single weights: the least important go, exactly as many as were asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.plan.allocation import Sharing


def unstructured_masks(importance: dict[str, Tensor], sparsity: float, allocation: Sharing) -> dict[str, Tensor]:
    """Masks, True where a weight stays; ``round(sparsity × weights)`` go, ties broken by position.

    Args:
        importance: by parameter name.
        sparsity: share to remove, in [0, 1).
    """
    comparable = allocation(importance)
    flat = torch.cat([comparable[name].flatten().double() for name in importance])
    remove = round(sparsity * len(flat))
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, stable=True).indices[:remove]] = False
    parts = keep.split([importance[name].numel() for name in importance])
    return {name: part.view(importance[name].shape) for name, part in zip(importance, parts, strict=True)}
