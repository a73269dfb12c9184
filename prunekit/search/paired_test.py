"""Whether two criteria differ over the same seeds: Student's t of paired differences, its p-value and interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

FEWEST = 3
"""Pairs that a test takes. With two, the interval is thirteen standard deviations wide to each side."""
LEVELS = (0.05, 0.01, 0.001)
"""A star for each that p is below."""
BISECTIONS = 200  # halve any interval of floats to nothing


@dataclass(frozen=True)
class PairedTest:
    """Paired differences over seeds, in the unit of the figures.

    Attributes:
        mean: of ours less theirs.
        pairs: seeds that have both.
        p: two-sided, of the hypothesis that the mean is 0; None where there is no test: fewer than ``FEWEST`` pairs, or
            differences that are all the same, which say nothing of how they would vary.
        low, high: the 95 % interval of the mean; None where there is no test.
    """

    mean: float
    pairs: int
    p: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def stars(self) -> int:
        """How many of ``LEVELS`` p is below."""
        return 0 if self.p is None else sum(self.p < level for level in LEVELS)


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedTest | None:
    """The test over the seeds that both have; None where there is none.

    Example:
        >>> found = paired_test({0: 5.0, 1: 6.0, 2: 7.5}, {0: 4.0, 1: 4.0, 2: 4.5})
        >>> found.mean, round(found.p, 3), found.stars
        (2.0, 0.074, 0)
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    mean, pairs = statistics.fmean(differences), len(differences)
    smallest = 1e-9 * max(abs(value) for value in (*ours.values(), *theirs.values()))  # of rounding, no variation
    if pairs < FEWEST or (deviation := statistics.stdev(differences)) <= smallest:
        return PairedTest(mean, pairs)
    error = deviation / math.sqrt(pairs)
    half = error * t_quantile(0.95, pairs - 1)
    return PairedTest(mean, pairs, max(0.0, 1 - t_within(abs(mean) / error, pairs - 1)), mean - half, mean + half)


def t_within(t: float, freedom: int) -> float:
    """The probability that Student's t of ``freedom`` degrees lies between ``-t`` and ``t``.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(within: float, freedom: int) -> float:
    """The ``t`` whose ``t_within`` is ``within``, by bisection of its angle, which has an end where ``t`` has none."""
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if t_within(math.sqrt(freedom) * math.tan(middle), freedom) < within:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)
