"""What is said of speed holds: intervals cover, two measurements agree, drift does not mislead. No clock runs in these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunekit.measure import bound, noisy
from prunekit.measure.latency import FEWEST, MOST, Timing, conditions, interval, latencies, timed

X = torch.zeros(4, 2)


class Machine:
    """A machine whose passes take a model's milliseconds, times a slowness that wanders, times noise."""

    def __init__(self, ms: dict[nn.Module, float], seed: int, noise: float = 0.1, slower: Callable[[int], float] | None = None):
        self.ms, self.random, self.noise, self.passes = ms, np.random.default_rng(seed), noise, 0
        self.slower = slower or (lambda passes: 1.0)

    def __call__(self, model: nn.Module, inputs: Any) -> float:
        self.passes += 1
        return self.ms[model] * self.slower(self.passes) * float(np.exp(self.noise * self.random.standard_normal()))


def pair() -> dict[str, nn.Module]:
    return {"dense": nn.Linear(2, 2), "pruned": nn.Linear(2, 2)}


def measured(seed: int, noise: float = 0.1, slower: Callable[[int], float] | None = None) -> Timing:
    models = pair()
    return timed(models, X, watch=Machine({models["dense"]: 3.0, models["pruned"]: 1.0}, seed, noise, slower))


def test_the_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    found = [interval(list(np.exp(random.standard_normal(40)))) for _ in range(400)]
    covered = np.mean([each.low <= 1 <= each.high for each in found])
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


@pytest.mark.parametrize(("count", "beyond"), [(3, 0), (5, 0), (6, 0), (9, 1), (10, 1)])
def test_its_ranks_are_those_of_the_sign_test(count: int, beyond: int) -> None:
    values = [float(i + 1) for i in range(count)]
    found = interval(values)
    assert (found.low, found.high) == (values[beyond], values[-1 - beyond])


def test_two_measurements_agree_within_their_intervals() -> None:
    """A search and an ``eval`` a minute later, on a machine that is half as fast by then."""
    apart = 0
    for seed in range(20):
        first, later = (measured(s, slower=lambda _, f=f: f).speedup("pruned") for s, f in ((seed, 1.0), (seed + 1000, 2.0)))
        apart += first.low > later.high or later.low > first.high
    assert apart <= 1
    assert measured(0).speedup("pruned").median == pytest.approx(3, rel=0.05)


def test_a_machine_that_becomes_busier_slows_both_sides() -> None:
    found = measured(0, noise=0.01, slower=lambda passes: 1 + passes / 20)
    assert found.speedup("pruned").median == pytest.approx(3, rel=0.02)
    assert found.ms("pruned").median > 1.5


def test_it_goes_on_until_it_is_known_or_says_that_the_machine_is_noisy() -> None:
    quiet, loud = measured(0, noise=0.001), measured(0, noise=2.0)
    assert len(quiet.rounds["dense"]) == 20
    assert not quiet.speedup("pruned").noisy
    assert len(loud.rounds["dense"]) == MOST or sum(map(sum, loud.rounds.values())) > 2000
    assert loud.speedup("pruned").noisy
    assert noisy(loud.speed("pruned", 4))
    assert not noisy(quiet.speed("pruned", 4))


def test_slow_models_get_the_fewest_rounds() -> None:
    models = pair()
    found = timed(models, X, 1.0, watch=Machine(dict.fromkeys(models.values(), 10_000.0), 0))
    assert len(found.rounds["dense"]) == FEWEST


def test_models_take_turns_from_both_ends() -> None:
    models, seen = pair(), []

    def watch(model: nn.Module, inputs: Any) -> float:
        seen.append("dense" if model is models["dense"] else "pruned")
        return 1.0

    timed(models, X, watch=watch)
    assert seen[6:10] == ["dense", "pruned", "pruned", "dense"]


def test_the_machines_own_clock_gives_figures_and_conditions_are_told() -> None:
    assert min(latencies(pair(), X, runs=2).values()) > 0
    assert "torch.compile off" in conditions()
    assert "channels_last off" in conditions()


def reason_at(ms: float, macs: float, alone: float | None = None, model: nn.Module | None = None) -> str:
    model = model or nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return bound.reason(model, X, macs, ms, watch=Machine({model: alone or 10 * ms}, 0, 0.0))


def test_a_reason_is_due_where_macs_fall_and_time_does_not() -> None:
    assert bound.is_due((90, 60), (1.0, 0.96))
    assert not bound.is_due((90, 61), (1.0, 0.96))
    assert not bound.is_due((90, 60), (1.0, 0.94))


def test_why_it_is_hardly_faster() -> None:
    with torch.no_grad():
        assert reason_at(2 * 0.049, 1e9).startswith("small layers: 49 µs")
        moved = 4 * (4 + 2 + 8 + 8)  # weights, bias, and the outputs of both layers
        assert reason_at(10, 9.9 * moved / len(X)).startswith("memory-bound: 9.9 MACs")
        assert "multiples of eight" in reason_at(10, 10.1 * moved / len(X))


def test_threads_that_bring_nothing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    assert reason_at(10, 1e9, alone=10.4).startswith("thread count: one thread takes 10.4 ms, 4 threads 10")
    assert not reason_at(10, 1e9, alone=10.6).startswith("thread count")
    assert now == [4]
