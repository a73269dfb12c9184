"""From signed per-sample scores to what a score file holds, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from prunekit.kernel import Contribution


def collect(
    contributions: Iterable[Contribution], prunable: tuple[str, ...], aggregation: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Aggregates signed scores to importances and keeps their exact sums along axes 0 and 1.

    Both aggregations are linear in something that adds up over chunks: absolute values (``l1``) or the signed sum
    (``mean``), so no chunk has to be kept.

    Returns:
        importance of the prunable parameters, and ``<param>@<axis>`` -> ``(samples, targets, axis size)`` of all.
    """
    importance: dict[str, Tensor] = {}
    sums: dict[str, list[Tensor]] = {}
    count = 0
    for part in contributions:
        for name, signed in part.scores.items():
            if name in prunable:
                piece = signed.abs().sum((0, 1)) if aggregation == "l1" else signed.sum((0, 1))
                importance[name] = importance[name] + piece if name in importance else piece
            axes = range(2, signed.dim())
            for axis in list(axes)[:2]:
                others = [a for a in axes if a != axis]
                sums.setdefault(f"{name}@{axis - 2}", []).append((signed.sum(others) if others else signed.clone()).cpu())
        count += next(iter(part.scores.values())).shape[:2].numel()
    if aggregation == "mean":
        importance = {name: (total / count).abs() for name, total in importance.items()}
    return {k: v.cpu() for k, v in importance.items()}, {k: torch.cat(v) for k, v in sums.items()}
