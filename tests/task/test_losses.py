"""Single losses add up to the batch's, in value and in gradient, for every task and loss; what mixes its batch is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import UsageError, score
from prunekit.criteria.evidence import Evidence
from prunekit.data import Samples
from prunekit.task import TASKS, Task, get_task
from tests.conftest import imported

N, C, L = 7, 4, 5
WEIGHT = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def some_ignored(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels.view(-1)[::3] = -100
    labels[0] = -100  # a sample without any place that counts
    return labels


def contrastive(out: Tensor, y: Tensor) -> Tensor:
    return (out @ out.T).logsumexp(1).mean()


def weighted_closure(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, weight=WEIGHT)


CASES: dict[str, tuple[str, Any, Callable[[], Tensor], Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    # name: task, loss given, outputs, labels, the batch's loss by plain torch
    "cross entropy": ("classification", None, lambda: draw(N, C), lambda: torch.randint(C, (N,)), F.cross_entropy),
    "class weights": (
        "classification", functools.partial(F.cross_entropy, weight=WEIGHT), lambda: draw(N, C),
        lambda: torch.randint(C, (N,)), functools.partial(F.cross_entropy, weight=WEIGHT),
    ),
    "module with weights": (
        "classification", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), lambda: draw(N, C),
        lambda: torch.randint(C, (N,)), nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    ),
    "weights in a closure": (
        "classification", weighted_closure, lambda: draw(N, C), lambda: torch.arange(N) % C, weighted_closure
    ),
    "sum": (
        "classification", functools.partial(F.cross_entropy, reduction="sum"), lambda: draw(N, C),
        lambda: torch.randint(C, (N,)), functools.partial(F.cross_entropy, reduction="sum"),
    ),
    "sum of squares": (
        "regression", lambda o, y: (o - y).square().sum(), lambda: draw(N, 2), lambda: draw(N, 2),
        lambda o, y: (o - y).square().sum(),
    ),
    "ignored labels": (
        "classification", None, lambda: draw(N, C), lambda: torch.tensor([0, -100, 2, 3, -100, 1, 0]), F.cross_entropy
    ),
    "soft labels": ("classification", None, lambda: draw(N, C), lambda: draw(N, C).softmax(1), F.cross_entropy),
    "smoothed": (
        "classification", functools.partial(F.cross_entropy, label_smoothing=0.2), lambda: draw(N, C),
        lambda: torch.randint(C, (N,)), functools.partial(F.cross_entropy, label_smoothing=0.2),
    ),
    "segmentation": (
        "segmentation", None, lambda: draw(N, C, 3, 2), lambda: some_ignored(torch.randint(C, (N, 3, 2))), F.cross_entropy
    ),
    "segmentation, weighted": (
        "segmentation", nn.CrossEntropyLoss(WEIGHT), lambda: draw(N, C, 3, 2), lambda: some_ignored(torch.randint(C, (N, 3, 2))),
        nn.CrossEntropyLoss(WEIGHT),
    ),
    "tokens": (
        "token_classification", None, lambda: draw(N, L, C), lambda: some_ignored(torch.randint(C, (N, L))),
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
    ),
    "masked tokens": (
        "masked_lm", None, lambda: draw(N, L, C), lambda: some_ignored(torch.randint(C, (N, L))),
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
    ),
    "user's token loss": (
        "token_classification", lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), lambda: draw(N, L, C),
        lambda: some_ignored(torch.randint(C, (N, L))), lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
    ),
    "binary": (
        "binary", None, lambda: draw(N, 1), lambda: torch.randint(2, (N,)),
        lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.double()),
    ),
    "multi-label": (
        "multi_label", None, lambda: draw(N, C), lambda: torch.randint(2, (N, C)).double(), F.binary_cross_entropy_with_logits
    ),
    "multi-label, weighted": (
        "multi_label", nn.BCEWithLogitsLoss(pos_weight=WEIGHT), lambda: draw(N, C), lambda: torch.randint(2, (N, C)).double(),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
    ),
    "squared error": ("regression", None, lambda: draw(N, 2), lambda: draw(N, 2), F.mse_loss),
    "absolute error": ("regression", F.l1_loss, lambda: draw(N, 2), lambda: draw(N, 2), F.l1_loss),
    "huber": ("regression", F.huber_loss, lambda: draw(N, 2), lambda: draw(N, 2), F.huber_loss),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_single_losses_add_up_to_the_batch(name: str) -> None:
    torch.manual_seed(1)
    task_name, given, outputs, labels, plain = CASES[name]
    task = get_task(task_name, given)
    out, y = outputs().requires_grad_(), labels()
    expected = plain(out, y)
    (slope,) = torch.autograd.grad(expected, out)
    torch.testing.assert_close(task.loss.batch(out, y), expected)
    parts = task.loss.of_each(out, y).nan_to_num(0) * task.loss.factors(out, y)
    total = parts.mean()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(total, out)[0].nan_to_num(0), slope, rtol=1e-5, atol=1e-9)
    # every row by itself: other samples do not matter
    alone = [float(task.loss.of_each(out[k : k + 1], y[k : k + 1])) for k in range(N)]
    torch.testing.assert_close(
        task.loss.of_each(out, y).detach().nan_to_num(0),
        torch.tensor(alone, dtype=out.dtype).nan_to_num(0),
        rtol=1e-9,
        atol=1e-12,
    )


def test_a_loss_that_mixes_its_batch_is_refused_for_single_samples_and_works_for_batches() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, C)
    x, y = torch.randn(N, 3), torch.randint(C, (N,))
    trajectory = imported(model)
    with pytest.raises(UsageError, match="contrastive mixes the samples of a batch"):
        score(trajectory, model, [(x, y)], criterion="taylor", loss=contrastive)
    found = score(trajectory, model, [(x, y)], criterion="snip", loss=contrastive).importance["weight"]
    contrastive(model(x), y).backward()
    torch.testing.assert_close(found, (model.weight * model.weight.grad).abs().detach(), rtol=1e-5, atol=1e-7)


class InDouble(nn.Module):
    """The loss is computed in double precision, whatever the path's is."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batches", [1, 3])
def test_scores_are_those_of_the_whole_sample(name: str, batches: int) -> None:
    """taylor, snip and gradient against plain autograd of the loss over all samples at once."""
    task_name, given, outputs, labels, plain = CASES[name]
    torch.manual_seed(2)
    y = labels()
    shape = outputs().shape[1:]
    model = nn.Sequential(nn.Linear(3, int(torch.Size(shape).numel())), nn.Unflatten(1, shape), InDouble())
    x = torch.randn(N, 3)
    trajectory = imported(model)
    plain(model(x), y).backward()
    expected = (model[0].weight * model[0].weight.grad).abs().detach()
    parts = list(zip(x.split(-(-N // batches)), y.split(-(-N // batches)), strict=True))
    if batches > 1 and name in ("weights in a closure", "user's token loss", "sum of squares", "sum"):
        return  # what such losses are over several batches is a matter of definition
    for criterion in ("taylor", "snip"):
        found = score(trajectory, model, parts, criterion=criterion, task=get_task(task_name, given)).importance["0.weight"]
        torch.testing.assert_close(found, expected.to(found), rtol=2e-4, atol=2e-6)


def test_every_task_has_its_targets_and_refuses_others() -> None:
    for name in TASKS:
        task: Task = get_task(name)
        assert task.target in task.targets()
        for target in {"outputs", "log_prob", "margin", "loss"} - set(task.targets()):
            with pytest.raises(UsageError, match=f"does not exist for the task {name}; it has"):
                task.get_target(target)


def test_evidence_explains_the_loss_of_all_its_samples() -> None:
    torch.manual_seed(3)
    model = nn.Linear(3, C)
    x, y = torch.randn(N, 3), torch.randint(C, (N,))
    loss = functools.partial(F.cross_entropy, weight=WEIGHT.float())
    evidence = Evidence(imported(model), model, ("weight",), Samples.held([(x[:4], y[:4]), (x[4:], y[4:])]), get_task(None, loss))
    function, samples = evidence.explained("loss")
    parts = torch.cat([function(evidence.state, *batch) for batch in samples])
    torch.testing.assert_close(parts.mean(), loss(model(x), y))
