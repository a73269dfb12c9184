"""The rate that tuning starts at follows from how far the pruned model is from the dense one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import Trajectory, make_plan, score
from prunekit.apply import masked
from prunekit.data.samples import Samples
from prunekit.steps import ByDivergence, Finetuning, Tuner
from prunekit.steps.rate import MOST, NEAR
from prunekit.task import Classification, Regression
from tests.conftest import TinyNet, tiny_data

X, Y = tiny_data(24, torch.float64)


def test_it_is_of_the_masked_model_that_a_run_starts_from() -> None:
    """Checked against KL in plain torch, of every run anew; the schedule starts from it."""
    torch.manual_seed(0)
    dense = TinyNet().double()
    plan = make_plan(score(Trajectory.of(dense), dense, criterion="magnitude"), dense, sparsity=0.4)
    model, samples = copy.deepcopy(dense), Samples.held([(X, Y)])

    def far(pruned: nn.Module) -> float:
        with torch.no_grad():
            logs, wanted = F.log_softmax(pruned(X), 1), F.log_softmax(dense(X), 1)
        return float((wanted.exp() * (wanted - logs)).sum(1).mean())

    how = Finetuning(
        lambda i: (X[i], Y[i]), len(X), lambda one: torch.optim.Adam(one.parameters(), lr=99.0), epochs=1, batch_size=24,
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps),
        rate=ByDivergence(dense, samples, Classification()),
    )  # fmt: skip
    first = min(MOST, NEAR * far(masked(dense, plan)) ** 0.5)
    with Tuner(model, plan.masks(), how, None, {}) as tuner:
        tuner.run()
        second = min(MOST, NEAR * far(model) ** 0.5)
        tuner.run()
    assert tuner.rates == pytest.approx([first, second], rel=1e-9)
    assert first < 99.0
    assert first != second


def test_it_is_the_largest_where_a_task_has_no_divergence_of_distributions() -> None:
    model = nn.Linear(3, 1)
    samples = Samples.held([(torch.randn(8, 3), torch.randn(8, 1))])
    assert ByDivergence(model, samples, Regression())(copy.deepcopy(model)) == MOST


def test_nothing_to_mend_needs_no_step() -> None:
    torch.manual_seed(0)
    dense = TinyNet().double()
    assert ByDivergence(dense, Samples.held([(X, Y)]), Classification())(copy.deepcopy(dense)) == 0
