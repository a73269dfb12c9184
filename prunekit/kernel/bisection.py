"""Error-controlled quadrature of one piece: halve where, and for the samples for which, the midpoint is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels, size, take
from prunekit.kernel.function import ModelFunction

DEPTH = 12  # halvings at most
ROUNDING = 64  # units in the last place of an output, below which no interval is halved for: no smaller error can be seen


@dataclass(frozen=True)
class Accepted:
    """An interval whose slope is good enough for the samples ``who``.

    ``node``: where on [0, 1] the slope was taken, the interval's own midpoint or its parent's; ``weight``: the interval's
    length; ``slope``: ``∇f · D`` there, ``(samples in who, targets)``.
    """

    node: float
    weight: float
    who: Tensor
    slope: Tensor


def bisect(
    function: ModelFunction,
    theta: Tensor,
    end: Tensor,
    x: Inputs,
    y: Labels,
    f_begin: Tensor,
    f_end: Tensor,
    tolerance: float,
    spent: Callable[[int], None] = lambda samples: None,
) -> Iterator[Accepted]:
    """Intervals that together cover [0, 1] for every sample, each off by at most ``tolerance``.

    The exact value of an interval is the difference of ``f`` at its ends, so the error is known, not estimated. A midpoint's
    directional derivative brings ``f`` there along with it; so of an interval that was off, a half that its slope fits is
    accepted with it, and only the other half is looked at again.

    The allowance does not shrink with the interval: one with a kink is off in proportion to its length however short it is, so
    an allowance in proportion to the length would halve until the depth runs out (benchmarks/README.md, "Over seeds").

    Args:
        theta, end: the piece's ends, ``(P,)``.
        f_begin, f_end: ``f`` there, ``(samples, targets)``.
        tolerance: of every interval, per sample, in the target's unit (largest over targets); no less than the rounding of
            outputs as large as those at the ends: a model that diverged has such.
        spent: called with the number of samples of every directional derivative, of rejected midpoints too.
    """
    direction = end - theta
    largest = torch.maximum(f_begin.abs().amax(1), f_end.abs().amax(1))
    allowed = (ROUNDING * torch.finfo(f_begin.dtype).eps * largest).clamp_min(tolerance)

    def misses(slope: Tensor, length: float, f_low: Tensor, f_high: Tensor, who: Tensor) -> Tensor:
        return (slope * length - (f_high - f_low)).abs().amax(1) > allowed[who]

    samples = size(x)
    everyone = torch.arange(samples, device=f_begin.device)
    pending = [(0.0, 1.0, everyone, f_begin, f_end, DEPTH)]
    while pending:
        low, high, who, f_low, f_high, left = pending.pop()
        middle, length = (low + high) / 2, high - low
        f_middle, slope = function.directional(
            torch.lerp(theta, end, middle), direction, take(x, who, samples), take(y, who, samples)
        )
        spent(len(who))
        off = (
            misses(slope, length, f_low, f_high, who) if left else torch.zeros(len(who), dtype=torch.bool, device=f_begin.device)
        )
        if not off.all():
            yield Accepted(middle, length, who[~off], slope[~off])
        for begin, finish, f_first, f_last in ((low, middle, f_low, f_middle), (middle, high, f_middle, f_high)):
            again = off & misses(slope, length / 2, f_first, f_last, who)
            fits = off & ~again
            if fits.any():
                yield Accepted(middle, length / 2, who[fits], slope[fits])
            if again.any():
                pending.append((begin, finish, who[again], f_first[again], f_last[again], left - 1))
