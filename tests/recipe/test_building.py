"""Schedules of the rate, of any number of steps."""

from __future__ import annotations

import pytest
import torch

from prunekit.recipe import scheduler_of
from prunekit.recipe.training import RateSchedule


@pytest.mark.parametrize("name", ["onecycle", "triangular", "cosine"])
@pytest.mark.parametrize("warmup", [0.1, 0.2, 0.25, 0.5])
def test_a_schedule_fits_any_number_of_steps(name: str, warmup: float) -> None:
    """A rise of one step is no rise for torch, which would divide by its length."""
    for steps in range(1, 25):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        schedule = scheduler_of(optimizer, steps, RateSchedule.model_validate({"name": name, "warmup": warmup}))
        for _ in range(steps - 1):
            assert 0 <= optimizer.param_groups[0]["lr"] <= 0.5 * (1 + 1e-9)
            optimizer.step()
            schedule.step()
