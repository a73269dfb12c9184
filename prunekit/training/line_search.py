"""How long Adam's steps may be at first: as long as the one step along its direction that loses least.

A rate that suits one model and one sparsity harms another: weights of wide layers, and of a model that is nearly right, want
smaller steps. Adam's direction at the start, ``m / (√v + ε)`` with the means of gradients and of their squares over a few
batches, is the same for any scale of the loss, so how far to go along it is what is left to find: the length after which the
divergence on samples that judge is least, among powers of √2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from prunekit import ranks

K = TypeVar("K", bound=Hashable)

BATCHES = 16
"""So many batches of training say the direction."""
FIRST, FACTOR = 1e-3, math.sqrt(2)
"""The length of weights' steps that is tried first, and the factor between two lengths."""
SHORTER, LONGER = 26, 11
"""How many factors shorter or longer than the first a length may be: of weights from 1.2e-7 to 0.045."""
SHORTEST, LONGEST = FIRST * FACTOR**-SHORTER, FIRST * FACTOR**LONGER
"""The ends of that."""
HUGE = 1e300
"""Stands for what is not finite, which JSON has no word for."""
EPSILON = 1e-8
"""Adam's ``ε``."""


class Direction(Generic[K]):
    """Adam's direction at a point: means over batches of gradients and of their squares, by any key; 8 bytes a value."""

    def __init__(self) -> None:
        self._sums: dict[K, tuple[Tensor, Tensor]] = {}
        self._batches = 0

    def add(self, key: K, gradient: Tensor) -> None:
        """Adds a batch's gradient of one tensor."""
        if key not in self._sums:
            self._sums[key] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
        first, second = self._sums[key]
        first.add_(gradient)
        second.addcmul_(gradient, gradient)

    def next(self) -> None:
        """A batch's gradients are all added."""
        self._batches += 1

    def finish(self) -> dict[K, Tensor]:
        """``m / (√v + ε)`` by key, whose sums are given up for it."""
        n = self._batches
        return {key: first.div_(n).div_(second.div_(n).sqrt_().add_(EPSILON)) for key, (first, second) in self._sums.items()}


class Watcher(torch.optim.Optimizer):
    """Looks at gradients where an optimizer would step, and moves nothing.

    Attributes:
        direction: of what it has seen.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.direction = Direction[nn.Parameter]()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.direction.add(parameter, parameter.grad)
        self.direction.next()


def best_length(far: Callable[[float], float], first: float = FIRST, floor: float = 0.0) -> float:
    """The length of a step after which ``far`` is least: 0 where it is 0 before any, the shortest where every one harms.

    From ``first`` on it goes up, or down, while that lowers ``far``; several ranks take the first one's figures.

    Args:
        far: how far from its aim a model is after a step of such a length; NaN is as bad as infinity.
        first: the length that is tried first.
        floor: what ``far`` cannot be below: where it is there already, no step is needed.
    """

    def at(power: int | None) -> float:
        found = far(0.0 if power is None else first * FACTOR**power)
        return ranks.from_first(lambda: found if math.isfinite(found) else HUGE)

    start = at(None)
    if start <= floor:
        return 0.0
    power, least = 0, at(0)
    while power < LONGER and (found := at(power + 1)) < least:
        power, least = power + 1, found
    if power == 0:
        while power > -SHORTER and ((found := at(power - 1)) < least or least >= start):
            power, least = power - 1, found
    return first * FACTOR**power
