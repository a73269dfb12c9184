"""Budgets: the least that must go, the most that may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.search.budget import GRID, HIGHEST, least, most


@given(st.floats(0, 100))
def test_least_is_as_little_as_the_budget_allows(budget: float) -> None:
    found, reached = least(lambda sparsity: 100 * (1 - sparsity), budget)
    if budget >= 100 * (1 - HIGHEST):
        assert reached <= budget
        assert found == pytest.approx(max(0.0, 1 - budget / 100), abs=2**-11)
    else:
        assert found == HIGHEST
        assert reached > budget


@given(st.floats(0.02, 0.97))
def test_most_goes_to_the_edge_of_a_cliff(edge: float) -> None:
    found = most(lambda sparsity: 0.9 if sparsity <= edge else 0.1, 0.8, halvings=6)
    if edge < GRID[-1]:
        assert found is None
    else:
        assert found is not None
        sparsity, accuracy = found
        assert accuracy == 0.9
        above = min((s for s in GRID if s > edge), default=1.0)
        below = max(s for s in GRID if s <= edge)
        assert edge - (above - below) / 2**6 <= sparsity <= edge


def test_most_returns_what_it_saw() -> None:
    """Accuracy is no clean function of sparsity: what counts is the model that was measured."""
    seen = {}

    def accuracy(sparsity: float) -> float:
        seen[sparsity] = 0.95 if sparsity in (0.92, 0.5) else 0.1
        return seen[sparsity]

    assert most(accuracy, 0.9) == (0.92, 0.95)
