"""Samples stay as they are, whatever a model does in place to what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import Trajectory, make_plan, prune, refine, score
from prunekit.apply import compensate, layerwise
from prunekit.data import Samples
from prunekit.layerwise import prune_layerwise
from prunekit.measure.macs import macs
from prunekit.steps.finetune import Finetuning, finetune
from prunekit.task import get_task
from prunekit.task.evaluation import evaluate
from prunekit.training import Distillation
from prunekit.trajectory.copies import copied

TASK = get_task("classification")


class Centred(nn.Module):
    """Takes a mean from its inputs, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.in_place = nn.Linear(5, 8), nn.Linear(8, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5) if self.in_place else x - 0.5
        found: Tensor = self.second(torch.relu(self.first(x)))
        return found


def plan_of(model: nn.Module, x: Tensor, structure: str = "unstructured") -> Any:
    return make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, x[:2], sparsity=0.4, structure=structure)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def scores(criterion: str) -> Callable[..., Any]:
    return lambda model, batches: score(Trajectory.of(model), model, batches, criterion=criterion).importance


USES: dict[str, Callable[[nn.Module, list[tuple[Tensor, Tensor]]], Any]] = {
    "evaluate": lambda m, b: evaluate(m, Samples.of(b, TASK.batch), TASK).figures(),
    "taylor": scores("taylor"),
    "wanda": scores("wanda"),
    "kfac": scores("kfac"),
    "obs": scores("obs"),
    "refine": lambda m, b: refine(plan_of(m, b[0][0]), m, b, rounds=2, steps=4).keep,
    "layerwise": lambda m, b: tensors(layerwise(m, plan_of(m, b[0][0]), b)),
    "compensate": lambda m, b: tensors(compensate(m, plan_of(m, b[0][0]), b)),
    "admm": lambda m, b: tensors(prune_layerwise(m, b, method="admm", sparsity=0.4)[1]),
    "channels": lambda m, b: tensors(prune(m, plan_of(m, b[0][0], "channels"), b[0][0][:2])),
    "macs": lambda m, b: macs(m, b[0][0]),
}


@pytest.mark.parametrize("use", list(USES))
def test_samples_stay_as_they_are(use: str) -> None:
    found = []
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    for in_place in (False, True):
        given = x.clone()
        batches = [(given[:25], torch.arange(25) % 3), (given[25:], torch.arange(15) % 3)]
        found.append(USES[use](Centred(in_place), batches))
        assert torch.equal(given, x)
    torch.testing.assert_close(found[1], found[0])


def test_a_teacher_is_asked_about_the_samples_that_the_student_saw() -> None:
    """Trained beside itself, a model stays as it is."""
    torch.manual_seed(0)
    model, x = Centred(True), torch.randn(32, 5)
    plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = Finetuning(
        batch=lambda indices: (x[indices], torch.zeros(len(indices)).long()),
        samples=32,
        optimizer=lambda one: torch.optim.SGD(one.parameters(), lr=1.0),
        task=TASK,
        epochs=1,
        batch_size=32,
        distill=Distillation(copied(model), 1.0, 1.0, TASK),
    )
    finetune(model, plan, how)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])
