"""The length of a step: least of what it is judged by, among powers of √2."""

from __future__ import annotations

import math

import pytest
import torch

from prunekit.training.line_search import FACTOR, FIRST, LONGER, SHORTER, Direction, best_length


@pytest.mark.parametrize("best", [3e-6, 1e-4, 9e-4, 1e-3, 2e-3, 0.03])
def test_it_is_the_least_of_all_lengths(best: float) -> None:
    def far(length: float) -> float:
        return 1 + (length / best - 1) ** 2

    every = [FIRST * FACTOR**power for power in range(-SHORTER, LONGER + 1)]
    assert best_length(far) == min(every, key=far)


def test_nothing_to_mend_takes_no_step() -> None:
    assert best_length(lambda length: length) == 0


def test_what_only_harms_takes_the_shortest() -> None:
    assert best_length(lambda length: 1 + length) == pytest.approx(FIRST * FACTOR**-SHORTER)


def test_it_ends_where_longer_is_always_better() -> None:
    assert best_length(lambda length: 1 / (1 + length)) == pytest.approx(FIRST * FACTOR**LONGER)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lengths_that_break_the_model_are_passed_over(bad: float) -> None:
    assert best_length(lambda length: bad if length > 1e-5 else 1 - length) == pytest.approx(1e-5, rel=0.3)


def test_the_direction_is_adams_without_its_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    found = Direction()
    for gradient in gradients:
        found.add("w", gradient)
        found.next()
    wanted = gradients.mean(0) / (gradients.square().mean(0).sqrt() + 1e-8)
    torch.testing.assert_close(found.finish()["w"], wanted)
