"""How layers share the pruning: transforms of importances before one global ranking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.errors import UsageError, nearest

Allocation = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""``layer -> importances`` to ``layer -> comparable importances``; shapes are kept."""


def keep_global(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Global: importances compete across layers as they are."""
    return importance


def uniform(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Uniform: each layer's importances become their rank in it, in (0, 1), so every layer loses the same share."""
    return {name: _ranks(values) for name, values in importance.items()}


def _ranks(values: Tensor) -> Tensor:
    order = torch.sort(values.flatten(), stable=True).indices
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = (torch.arange(len(order), dtype=torch.float64) + 0.5) / len(order)
    return ranks.view(values.shape)


ALLOCATIONS: dict[str, Allocation] = {"global": keep_global, "uniform": uniform}


def get_allocation(name: str) -> Allocation:
    """Looks an allocation up.

    Raises:
        UsageError: unknown; near names are offered.
    """
    if name not in ALLOCATIONS:
        raise UsageError(f"allocation {name!r} does not exist; {nearest(name, list(ALLOCATIONS))}")
    return ALLOCATIONS[name]
