"""The arithmetic of a comparison: areas, who is chosen on what, regret, paired differences."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.search.summary import Runs, area, paired, spread, summarise


def row(seed: int, criterion: str, sparsity: float, validation: float, test: float, **more: Any) -> dict[str, Any]:
    return {
        "case": "c", "seed": seed, "structure": "unstructured", "criterion": criterion, "allocation": "global",
        "sparsity": sparsity, "control": "", "epochs": 0, "repair": "", "achieved": sparsity, "achieved_all": sparsity,
        "validation": {"accuracy": validation, "agreement": validation, "kl": 1 - validation},
        "test": {"accuracy": test, "agreement": test, "kl": 1 - test}, **more,
    }  # fmt: skip


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(0, 0.99), st.floats(0, 1)), min_size=2, max_size=9, unique_by=lambda p: round(p[0], 3)))
def test_area_is_the_mean_height_by_fine_steps(points: list[tuple[float, float]]) -> None:
    curve = {round(s, 3): f for s, f in points}
    x = sorted(curve)
    steps, total = 4000, 0.0
    for k in range(steps):
        s = x[0] + (x[-1] - x[0]) * (k + 0.5) / steps
        right = next(i for i in range(1, len(x)) if s <= x[i])
        left, weight = x[right - 1], (s - x[right - 1]) / (x[right] - x[right - 1])
        total += (1 - weight) * curve[left] + weight * curve[x[right]]
    assert area(curve) == pytest.approx(100 * total / steps, abs=0.5)


def test_choices_look_at_validation_data_alone() -> None:
    """On validation data a is better at 0.5, b at 0.9; on test data it is the other way round, and nobody may know."""
    rows = [
        row(0, "a", 0.5, 0.9, 0.1), row(0, "a", 0.9, 0.1, 0.9),
        row(0, "b", 0.5, 0.3, 0.8), row(0, "b", 0.9, 0.5, 0.2),
    ]  # fmt: skip
    runs = Runs(rows, "c", "unstructured", {"a": ["a"], "b": ["b"], "either": ["a", "b"]})
    assert {s: found["criterion"] for s, found in runs.auto(0).items()} == {0.5: "a", 0.9: "b"}
    assert runs.auto_areas() == {0: pytest.approx(100 * (0.1 + 0.2) / 2)}
    assert runs.chosen(0, "either") == ("a", "global")  # validation areas: 0.5 and 0.4
    assert runs.areas("either") == {0: pytest.approx(50)}
    assert runs.hindsight()[0] == ("a", "global")


def test_regret_is_paired_over_seeds() -> None:
    rows = [
        found
        for seed, (a, b) in enumerate([(0.9, 0.6), (0.8, 0.7), (0.7, 0.65)])
        for found in (row(seed, "a", 0.5, 0.1, a), row(seed, "b", 0.5, 0.9, b))
    ]
    (entry,) = summarise(rows, {"a": ["a"], "b": ["b"]})
    assert entry["auto"]["values"] == pytest.approx([60, 70, 65])
    assert entry["auto"]["hindsight"]["variant"] == ("a", "global")
    regret = entry["auto"]["regret"]
    assert regret["values"] == pytest.approx([30, 10, 5])
    assert regret["se"] == pytest.approx(statistics.stdev([30, 10, 5]) / math.sqrt(3))
    assert entry["methods"]["a"]["auto_ahead"]["mean"] == pytest.approx(-15)


def test_controls_and_tuned_rows_are_never_chosen() -> None:
    rows = [
        row(0, "a", 0.5, 0.5, 0.5),
        row(0, "a", 0.5, 1.0, 0.2, control="shuffled"),
        row(0, "a", 0.5, 1.0, 0.97, epochs=3, method="a"),
        row(0, "a", 0.5, 1.0, 0.98, epochs=3, method="a", repair="refined"),
        row(0, "a", 0.5, 1.0, 0.8, repair="compensated", method="a"),
        row(0, "a", 0.5, 1.0, 0.9, repair="refined", method="a"),
    ]
    (entry,) = summarise(rows, {"a": ["a"]})
    assert entry["auto"]["values"] == [50]
    assert entry["methods"]["a"]["shuffled"]["values"] == [20]
    facts = {"sparsities": [0.5], "unrepaired": spread([50.0])}
    assert entry["repaired"] == {
        "compensated": {"a": {**spread([80.0]), **facts}}, "refined": {"a": {**spread([90.0]), **facts}}
    }  # fmt: skip
    assert entry["tuned"] == [
        {"epochs": 3, "method": "a", "repair": repair, "sparsity": 0.5, "accuracy": spread([accuracy])}
        for repair, accuracy in (("", 97.0), ("refined", 98.0))
    ]


def test_one_seed_has_no_spread() -> None:
    assert spread([3.0]) == {"mean": 3.0, "std": None, "values": [3.0]}
    assert paired({0: 3.0, 1: 5.0}, {1: 1.0}) == {"mean": 4.0, "std": None, "values": [4.0], "se": None}
