"""Error-controlled quadrature of one piece: halve where, and for the samples for which, the midpoint is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.kernel.function import ModelFunction

DEPTH = 12  # halvings at most
# An interval with a kink is off in proportion to its length, however short: were it allowed an error in proportion to
# its length too, halving would never end. Below this length the allowance shrinks no further.
SHORTEST = 1 / 8


@dataclass(frozen=True)
class Accepted:
    """An interval whose midpoint is good enough for the samples ``who``.

    ``node``: the midpoint on [0, 1]; ``weight``: the interval's length; ``slope``: ``∇f · D`` there,
    ``(samples in who, targets)``.
    """

    node: float
    weight: float
    who: Tensor
    slope: Tensor


def bisect(
    function: ModelFunction,
    theta: Tensor,
    end: Tensor,
    x: Tensor,
    y: Tensor,
    f_begin: Tensor,
    f_end: Tensor,
    tolerance: float,
) -> Iterator[Accepted]:
    """Intervals that together cover [0, 1] for every sample, each off by at most ``tolerance`` times its length (1/8 at

    least): the piece is off by about ``tolerance`` at most, and how far exactly is known.

    The exact value of an interval is the difference of ``f`` at its ends, so the error is known, not estimated; and a
    midpoint's directional derivative brings ``f`` there along with it, so halving costs no further call.

    Args:
        theta, end: the piece's ends, ``(P,)``.
        f_begin, f_end: ``f`` there, ``(samples, targets)``.
        tolerance: for the whole piece, per sample, in the target's unit (largest over targets).
    """
    direction = end - theta
    everyone = torch.arange(len(x), device=x.device)
    pending = [(0.0, 1.0, everyone, f_begin, f_end, DEPTH)]
    while pending:
        low, high, who, f_low, f_high, left = pending.pop()
        middle, length = (low + high) / 2, high - low
        f_middle, slope = function.directional(torch.lerp(theta, end, middle), direction, x[who], y[who])
        off = (slope * length - (f_high - f_low)).abs().amax(1) > tolerance * max(length, SHORTEST)
        done = ~off if left else torch.ones_like(off)
        if done.any():
            yield Accepted(middle, length, who[done], slope[done])
        if not done.all():
            rest = ~done
            pending.append((low, middle, who[rest], f_low[rest], f_middle[rest], left - 1))
            pending.append((middle, high, who[rest], f_middle[rest], f_high[rest], left - 1))
