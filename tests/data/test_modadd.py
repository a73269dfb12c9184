"""Modular addition: every pair once, the right sums, disjoint splits, and scoring samples that touch every number."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import UsageError
from prunekit.data import modadd


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(modulus=st.integers(4, 23), seed=st.integers(0, 99), shares=st.tuples(*[st.floats(0.05, 0.3)] * 3))
def test_splits_are_every_pair_once_with_its_sum(modulus: int, seed: int, shares: tuple[float, float, float]) -> None:
    pairs = modulus * (modulus + 1) // 2
    train, validation, scoring = (max(1, int(share * pairs)) for share in shares)
    splits = modadd(modulus, train, validation, scoring, seed)
    assert [len(splits[name][0]) for name in ("train", "validation", "scoring")] == [train, validation, scoring]
    seen = []
    for x, y in splits.values():
        for (a, plus, b, equals), label in zip(x.tolist(), y.tolist(), strict=True):
            assert (plus, equals, label) == (modulus, modulus + 1, (a + b) % modulus)
            seen.append((a, b))
    assert sorted(seen) == [(a, b) for a in range(modulus) for b in range(a + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_scoring_touches_every_number_of_the_paper_s_task(seed: int) -> None:
    scoring = modadd(seed=seed)["scoring"][0]
    assert len(scoring) == 200
    assert sorted(set(scoring.flatten().tolist())) == list(range(115))


def test_the_seed_decides_the_splits() -> None:
    first, again, other = (modadd(seed=seed)["train"][0] for seed in (3, 3, 4))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("sizes", [{"train": 4400, "validation": 2000, "scoring": 41}, {"scoring": 0}, {"modulus": 1}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="leave pairs for testing"):
        modadd(**sizes)
