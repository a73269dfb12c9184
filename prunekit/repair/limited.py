"""What all patterns of units have in common: which sets of them are allowed, and per-sample sums over a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from prunekit.kernel import ModelFunction, attribute
from prunekit.kernel.blame import Batches
from prunekit.plan import Plan
from prunekit.repair.limits import Allowance, Count, Limits
from prunekit.structure.stand_ins import Wanted
from prunekit.trajectory import Segment


class Limited:
    """``select`` and ``grow`` of all patterns: what ``limits`` allow."""

    keep: Tensor
    count: int
    limits: Count | Limits | Allowance

    def close(self, units: Tensor) -> None:
        """These units, none of them kept now, are never taken, ``(U,)`` boolean."""
        self.limits.close(units)

    def select(self, worth: Tensor) -> Tensor:
        return self.limits.select(worth)

    def stand_ins(self, keep: Tensor) -> Wanted:
        """What zeros do not say of a model with these units, see ``Plan.stand_ins``."""
        return {}

    def per_weight(self, total: Tensor) -> Tensor:
        return total  # all units hold as many

    def level(self, worth: Tensor) -> Tensor:
        return self.limits.level(worth)

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        return self.limits.grow(keep, gain, share)

    def exchange(self, worth: Tensor, grown: Tensor, gain: Tensor) -> Tensor:
        return self.limits.exchange(worth, grown, gain)


def decided(plan: Plan, name: str) -> tuple[bool, float]:
    """Whether a ratio says how much of a layer stays, and else which share of it must."""
    if any(fnmatchcase(name, pattern) for pattern in plan.provenance.get("ratios", {})):
        return True, 0.0
    return False, float(plan.provenance.get("floor", 0.0))


def contributions(function: ModelFunction, theta: Tensor, batches: Batches) -> Iterator[Mapping[str, Tensor]]:
    """By name ``θ ∂f`` of some samples at a time, ``(samples, targets, *parameter shape)``."""
    to_zero = Segment(0, theta, torch.zeros_like(theta), torch.zeros_like(theta))
    for x, y in batches:
        for part in attribute(function, lambda: [to_zero], x, y, rule="left", share="whole"):
            yield part.scores
