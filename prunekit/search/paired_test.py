"""Whether two criteria differ over the same seeds: Student's t of paired differences, its p-value and interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from prunekit.imports import needed

FEWEST = 3
"""Pairs that a test takes. With two, the interval is thirteen standard deviations wide to each side."""
LEVELS = (0.05, 0.01, 0.001)
"""A star for each that p is below."""


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

    Raises:
        UsageError: scipy is not installed; says what to install.

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
    if pairs < FEWEST or statistics.stdev(differences) <= smallest:
        return PairedTest(mean, pairs)
    stats = needed("scipy.stats")
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(0.95)
    return PairedTest(mean, pairs, float(found.pvalue), float(interval.low), float(interval.high))
