"""Model, samples, task and loss that do not fit each other are refused with the cause, and scores are plain autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunekit import UsageError, score
from prunekit.task import get_task
from tests.conftest import imported

N = 6


class Net(nn.Module):
    """Two layers, and a third for what ``answer`` makes of them."""

    def __init__(self, answer: Callable[[Net, Tensor], Any], outputs: int = 3) -> None:
        super().__init__()
        self.a, self.m, self.b, self.answer = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, outputs), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).tanh())


def drawn() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.randint(3, (N,))


def assert_taylor_is_autograd(net: nn.Module, batch: Any, whole: Callable[[], Tensor], **options: Any) -> None:
    found = score(imported(net), net, [batch], "taylor", **options).importance
    gradients = torch.autograd.grad(whole(), [net.get_parameter(name) for name in found], allow_unused=True)
    for (name, value), gradient in zip(found.items(), gradients, strict=True):
        weight = net.get_parameter(name).detach()
        expected = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6 * float(expected.max()) + 1e-30)


def test_a_weight_that_is_used_elsewhere_for_some_samples_only_is_seen() -> None:
    """The first two samples, on which engines are compared target by target, do not use it there."""
    x, y = drawn()
    x[:2, 0], x[2:, 0] = -5, 5
    net = Net(lambda net, x: net.b(net.a(x).tanh() + (x[:, :1] > 0) * F.linear(x, net.a.weight)))
    assert_taylor_is_autograd(net, (x, y), lambda: F.cross_entropy(net(x), y))


def test_a_weight_that_is_used_elsewhere_is_seen_however_small_gradients_are() -> None:
    x, y = drawn()
    net = Net(lambda net, x: net.b(F.linear(net.a(x).tanh(), net.m.weight)) * 1e-7)
    assert_taylor_is_autograd(net, (x, y), lambda: F.cross_entropy(net(x), y))


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpoints_are_scored() -> None:
    x, y = drawn()
    net = Net(lambda net, x: net.b(checkpoint(lambda h: net.m(h).tanh(), net.a(x), use_reentrant=True)))
    without = Net(lambda net, x: net.b(net.m(net.a(x)).tanh()))
    without.load_state_dict(net.state_dict())
    expected = score(imported(without), without, [(x, y)], "taylor").importance
    found = score(imported(net), net, [(x, y)], "taylor").importance
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    F.cross_entropy(net(x), y).backward()  # torch's own checkpoints are back


@pytest.mark.parametrize("labels", [lambda y: y.int(), lambda y: y[:, None], lambda y: y + 5, lambda y: y - 3, lambda y: y[:4],
                                    lambda y: None, lambda y: y > 0])  # fmt: skip
@pytest.mark.parametrize("criterion", ["taylor", "gradient"])
def test_labels_that_do_not_fit_are_refused(labels: Callable[[Tensor], Any], criterion: str) -> None:
    x, y = drawn()
    net = Net(plain)
    with pytest.raises(UsageError, match="data: labels of the scoring samples"):
        score(imported(net), net, [(x, labels(y))], criterion, task="classification")


@pytest.mark.parametrize(
    ("task", "outputs", "labels"),
    [
        ("binary", 1, torch.arange(N)),
        ("binary", 2, torch.arange(N) % 2),
        ("multi_label", 3, torch.rand(N, 3)),
        ("regression", 2, torch.rand(N)),
        ("regression", 1, torch.full((N,), torch.nan)),
    ],
)
def test_numbers_that_do_not_fit_are_refused(task: str, outputs: int, labels: Tensor) -> None:
    x, _ = drawn()
    net = Net(plain, outputs)
    with pytest.raises(UsageError, match="of the scoring samples"):
        score(imported(net), net, [(x, labels)], "taylor", task=task)


def test_a_class_a_place_is_asked_for() -> None:
    x, y = drawn()
    net = Net(lambda net, x: plain(net, x)[:, None].expand(-1, 4, -1))
    with pytest.raises(UsageError, match=r"need a class index a place, \(6, 4\)"):
        score(imported(net), net, [(x, y)], "taylor", task="token_classification")


def test_soft_labels_may_be_double() -> None:
    x, _ = drawn()
    net = Net(plain)
    soft = torch.rand(N, 3, dtype=torch.float64).softmax(1)
    assert_taylor_is_autograd(net, (x, soft), lambda: F.cross_entropy(net(x), soft.float()))


def test_losses_get_outputs_as_the_model_gives_them_and_broadcasting_is_refused() -> None:
    x, y = torch.randn(N, 5), torch.randn(N)
    flat = Net(lambda net, x: plain(net, x)[:, 0], 1)
    assert_taylor_is_autograd(flat, (x, y), lambda: F.mse_loss(flat(x), y), task="regression", loss=F.mse_loss)
    column = Net(plain, 1)
    with pytest.raises(UsageError, match="compares every output with every label"):
        score(imported(column), column, [(x, y)], "gradient", task="regression", loss=F.mse_loss)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"must return one number as a tensor, returned shape \(6,\)"),
        (lambda out, y: 3.0, "must return one number as a tensor, returned float"),
        (lambda out, y: torch.tensor(3.0), "does not depend on the model's outputs"),
        (lambda out, y: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_losses_that_are_none_are_refused(loss: Any, told: str) -> None:
    x, y = drawn()
    net = Net(plain)
    with pytest.raises(UsageError, match=told):
        score(imported(net), net, [(x, y)], "taylor", loss=loss)


def test_heads_take_their_loss_later_too() -> None:
    x, y = drawn()
    net = Net(lambda net, x: {"a": plain(net, x), "b": net.m(net.a(x))})

    def loss(heads: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return F.cross_entropy(heads[0], y) + heads[1].square().mean()

    assert_taylor_is_autograd(
        net, (x, y), lambda: loss((net(x)["a"], net(x)["b"]), y), task=get_task("heads", heads=["a", "b"]), loss=loss
    )


def test_models_that_cannot_be_scored_are_refused_with_the_cause() -> None:
    x, y = drawn()
    for answer, told in (
        (lambda net, x: plain(net, x).detach(), "do not depend on its weights"),
        (lambda net, x: 1 / 0, "ZeroDivisionError"),
        (lambda net, x: plain(net, x).sum(), "samples must be on their first axis"),
        (lambda net, x: plain(net, x - x.mean(0)), "gives the first sample alone other outputs"),
    ):
        net = Net(answer)
        with pytest.raises(UsageError, match=told):
            score(imported(net), net, [(x, y)], "taylor", task="classification")


def test_batch_statistics_allow_criteria_of_whole_batches() -> None:
    x, y = drawn()
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    with pytest.raises(UsageError, match="keeps no running statistics"):
        score(imported(net), net, [(x, y)], "taylor")
    found = score(imported(net), net, [(x, y)], "gradient").importance["0.weight"]
    F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(found, net[0].weight.grad.abs(), rtol=1e-4, atol=1e-7)


def test_batches_that_are_one_batch_or_none_are_refused() -> None:
    x, y = drawn()
    net = Net(plain)
    for batches, told in (((x, y), r"put it into a list"), ([(x[:0], y[:0])], "hold no samples")):
        with pytest.raises(UsageError, match=told):
            score(imported(net), net, batches, "taylor")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"class_weight": [1, 2, 3]}, "has no option 'class_weight'; did you mean class_weights"),
        ({"class_weights": "x"}, "must be a list of numbers"),
        ({"class_weights": [1, -2, float("nan")]}, "must be a list of numbers"),
        ({"ignore_index": "a"}, "must be a whole number"),
        ({"label_smoothing": "hi"}, "must be from 0 to below 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        get_task("classification", **options)
