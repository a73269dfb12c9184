"""How signed scores ``(samples, targets, ...)`` become one importance: a plain dict from name to aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Aggregation:
    """A function of something that adds up over samples and targets, so chunks can be added in any number.

    Attributes:
        each: what adds up, elementwise.
        finish: ``(total, samples × targets) -> importance``, non-negative.
    """

    each: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]

    def __call__(self, signed: Tensor) -> Tensor:
        """``(samples, targets, ...) -> (...)``."""
        return self.finish(self.each(signed).sum((0, 1)), signed.shape[0] * signed.shape[1])


AGGREGATIONS: dict[str, Aggregation] = {
    "l1": Aggregation(torch.abs, lambda total, count: total),
    "l2": Aggregation(torch.square, lambda total, count: total.sqrt()),
    "abs_mean": Aggregation(lambda signed: signed, lambda total, count: (total / count).abs()),
    "square": Aggregation(torch.square, lambda total, count: total / count),
}
"""``l1``: ``Σ|ψ|``; ``l2``: ``sqrt(Σψ²)``; ``abs_mean``: ``|mean ψ|`` (what samples disagree on cancels; the sign is lost);
``square``: ``mean ψ²``, the order of ``l2`` in the units of a squared change. Sums and means run over samples and targets."""
WRITTEN = {"abs_mean": "mean"}
"""How files and canonical names call an aggregation that had another name when they were first written."""
AGGREGATIONS |= {written: AGGREGATIONS[name] for name, written in WRITTEN.items()}


def written(name: str) -> str:
    """An aggregation's name in files and in criteria's canonical names, which is also accepted wherever one is asked for."""
    return WRITTEN.get(name, name)
