"""The paired test against published figures and another of scipy's functions, and where there is none."""

from __future__ import annotations

import pytest
from scipy import stats

from prunekit.search.paired_test import paired_test


def test_student_s_own_sleep_data() -> None:
    """Hours of sleep gained by ten patients under two drugs (Student, Biometrika 6, 1908): t = 4.0621, p = 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_test(dict(enumerate(second)), dict(enumerate(first)))
    assert found is not None
    assert found.mean == pytest.approx(1.58)
    assert (found.p, found.low, found.high) == pytest.approx((0.002833, 0.7001, 2.4599), rel=1e-3)
    assert found.stars == 2


def test_pairs_are_those_of_shared_seeds() -> None:
    ours, theirs = {0: 91.2, 1: 93.1, 2: 90.0, 3: 92.2, 7: 1.0}, {3: 90.1, 2: 89.7, 1: 91.0, 0: 90.0, 9: 5.0}
    found = paired_test(ours, theirs)
    peer = stats.ttest_rel([ours[s] for s in range(4)], [theirs[s] for s in range(4)])
    assert found is not None
    assert (found.pairs, found.p, found.mean) == (4, pytest.approx(peer.pvalue), pytest.approx(1.425))
    interval = peer.confidence_interval()
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.stars == (peer.pvalue < 0.05) + (peer.pvalue < 0.01) + (peer.pvalue < 0.001)


def test_too_few_pairs_and_differences_that_do_not_vary_have_no_test() -> None:
    assert paired_test({0: 1.0}, {1: 1.0}) is None
    two = paired_test({0: 5.0, 1: 9.0}, {0: 1.0, 1: 1.0})
    assert two is not None
    assert (two.mean, two.p, two.low, two.high, two.stars) == (6.0, None, None, None, 0)
    same = paired_test({0: 90.1, 1: 80.2, 2: 70.3}, {0: 90.0, 1: 80.1, 2: 70.2})
    assert same is not None
    assert (same.p, same.stars) == (None, 0)
