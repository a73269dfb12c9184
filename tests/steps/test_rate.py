"""The rate that tuning starts at is the length of the step along Adam's direction that leaves least divergence."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Plan, Trajectory, make_plan, score
from prunekit.apply import masked
from prunekit.data.samples import Samples
from prunekit.errors import UsageError
from prunekit.steps import ByDivergence, ByLoss, Finetuning, Tuner
from prunekit.task import Classification, Regression, Task, get_task
from prunekit.training import Distillation
from prunekit.training.line_search import FACTOR, FIRST, LONGER, SHORTER
from tests.conftest import TinyNet, tiny_data

X, Y = tiny_data(24, torch.float64)
EVERY = [FIRST * FACTOR**power for power in range(-SHORTER, LONGER + 1)]


def pruned_net() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    dense = TinyNet().double()
    return dense, make_plan(score(Trajectory.of(dense), dense, criterion="magnitude"), dense, sparsity=0.4)


def tuning(dense: nn.Module, **options: Any) -> Finetuning:
    samples = Samples.held([(X, Y)])
    return Finetuning(
        lambda i: (X[i], Y[i]), len(X), lambda one: torch.optim.Adam(one.parameters(), lr=99.0),
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps),
        distill=Distillation(dense, 1.0, 1.0), rate=ByDivergence(dense, samples, Classification()),
        **{"epochs": 1, "batch_size": 8, **options},
    )  # fmt: skip


def kl(pruned: nn.Module, dense: nn.Module) -> Tensor:
    logs, wanted = F.log_softmax(pruned(X), 1), F.log_softmax(dense(X), 1)
    return (wanted.exp() * (wanted - logs)).sum(1).mean()


def test_it_is_the_best_of_all_lengths_from_where_a_run_starts() -> None:
    """Checked against KL and Adam's direction in plain torch, of every run anew; one batch has all samples."""
    dense, plan = pruned_net()
    model = copy.deepcopy(dense)

    def wanted(start: nn.Module) -> float:
        start = copy.deepcopy(start)
        kl(start, dense).backward()
        named, masks = dict(start.named_parameters()), plan.masks()
        sign = {
            n: p.grad / (p.grad.abs() + 1e-8) * masks.get(n, torch.tensor(True)) for n, p in named.items() if p.grad is not None
        }
        values = {n: p.detach().clone() for n, p in named.items()}

        @torch.no_grad()
        def at(length: float) -> float:
            for name, direction in sign.items():
                named[name].copy_(values[name] - length * direction)
            return float(kl(start, dense))

        return min(EVERY, key=at)

    with Tuner(model, plan.masks(), tuning(dense, batch_size=24), None, {}) as tuner:
        first = wanted(masked(dense, plan))
        tuner.run()
        second = wanted(model)
        tuner.run()
    assert tuner.rates == pytest.approx([first, second])
    assert 0 < first < 99.0
    for name, keep in plan.masks().items():
        assert not model.get_parameter(name)[~keep].any()


@pytest.mark.parametrize("lora", [None, 2])
def test_the_search_leaves_no_trace(lora: int | None) -> None:
    """A run at the rate that was found, given, ends in the same weights: nothing else was moved or drawn."""
    dense, plan = pruned_net()
    net = nn.Sequential(dense, nn.Dropout(0.2)).train()
    plan = make_plan(score(Trajectory.of(net), net, criterion="magnitude"), net, sparsity=0.4)

    def run(how: Finetuning) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(1)
        model = copy.deepcopy(net)
        with Tuner(model, plan.masks(), how, None, {}) as tuner:
            tuner.run()
        return model, tuner.rates

    found, rates = run(tuning(net, lora=lora))
    given, _ = run(at_rate(tuning(net, lora=lora), rates[0]))
    assert rates[0] > 0
    for (name, one), other in zip(found.named_parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def at_rate(how: Finetuning, rate: float) -> Finetuning:
    return replace(how, rate=None, optimizer=lambda one: torch.optim.Adam(one.parameters(), lr=rate))


def test_numbers_have_a_distance_as_well() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(3, 1)
    x = torch.randn(8, 3)
    samples = Samples.held([(x, torch.randn(8, 1))])
    far = ByDivergence(dense, samples, Regression())
    other = copy.deepcopy(dense)
    assert far(other) == 0
    with torch.no_grad():
        other.bias.add_(0.5)
    assert far(other) == pytest.approx(0.5, rel=1e-5)


def test_a_loss_counts_labels_and_not_batches() -> None:
    """The mean over all that counts, whatever batches it comes in."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(10, 5, 3, dtype=torch.float64), torch.randint(4, (10, 5))
    y[0] = -100
    y[3:, 1:] = -100
    task = get_task("token_classification")
    expected = float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).detach())
    for sizes in ([10], [1, 2, 7]):
        parts = zip(x.split(sizes), y.split(sizes), strict=True)
        assert ByLoss(Samples.held(list(parts)), task)(model) == pytest.approx(expected)
    with pytest.raises(UsageError, match="none of the scoring samples has a label that counts"):
        ByLoss(Samples.held([(x[:1], y[:1])]), task)(model)


def test_a_task_without_a_distance_is_refused() -> None:
    class Bare(Task):
        name = "bare"

    with pytest.raises(UsageError, match="task bare has none"):
        ByDivergence(nn.Linear(3, 1), Samples.held([(torch.randn(8, 3), None)]), Bare())


def test_nothing_to_mend_needs_no_step() -> None:
    dense, _ = pruned_net()
    model = copy.deepcopy(dense)
    with Tuner(model, {}, tuning(dense), None, {}) as tuner:
        tuner.run()
    assert tuner.rates == [0]


def test_a_loss_may_be_below_nothing() -> None:
    """A density's logarithm has no floor: where it is negative there is still something to gain."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)

    def lowered(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels) - 100

    task = Regression(loss=lowered)
    how = Finetuning(
        lambda i: (x[i], y[i]), 16, lambda one: torch.optim.Adam(one.parameters(), lr=99.0), epochs=1, batch_size=16, task=task,
        rate=ByLoss(Samples.held([(x, y)]), task),
    )  # fmt: skip
    with Tuner(model, {}, how, None, {}) as tuner:
        tuner.run()
    assert 0 < tuner.rates[0] < 99
