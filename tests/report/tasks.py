"""Two recorded models that are no classifiers of single samples: numbers from two inputs, and a tagger with a padded mapping."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import Plan, Recorder, Trajectory, make_plan
from prunekit.batch import Batch, call, taken
from prunekit.explain import PrunedPath, flat_mask
from prunekit.task import Task, get_task
from prunekit.trajectory import Segment
from tests.structure_models import random_scores


class Numbers(nn.Module):
    """Two numbers from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.left(a) + self.right(b)))


class Tagger(nn.Module):
    """A class for every token, from a mapping; answers with a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.out = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids)
        mean = (x * attention_mask[..., None]).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return {"logits": self.out(torch.tanh(self.hidden(x + mean)))}


class Decider(nn.Module):
    """Yes or no: one logit a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))[:, 0]


def numbers(samples: int, generator: torch.Generator) -> Batch:
    a, b = (torch.randn(samples, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return (a, b), torch.stack([a[:, 0] * b[:, 0], a.sum(1)], 1)


def sentences(samples: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(1, 9, (samples, 5), generator=generator)
    lengths = torch.randint(2, 6, (samples,), generator=generator)
    mask = (torch.arange(5) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.where(mask.bool(), ids % 3, -100)


def questions(samples: int, generator: torch.Generator) -> Batch:
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > x[:, 1]).long()


MADE: dict[str, Any] = {
    "regression": (Numbers, numbers, "left"),
    "token_classification": (Tagger, sentences, "hidden"),
    "binary": (Decider, questions, "one"),
}


@dataclass(frozen=True)
class Case:
    """A trained model of a task, samples of it, and what was pruned."""

    task: Task
    model: nn.Module
    trajectory: Trajectory
    training: Batch
    test: Batch
    plan: Plan
    path: PrunedPath
    layer: str


def case(name: str, folder: Path, structure: str = "unstructured") -> Case:
    torch.manual_seed(0)
    factory, data, layer = MADE[name]
    task, model = get_task(name), factory().double()
    generator = torch.Generator().manual_seed(5)
    training, test = data(24, generator), data(9, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with Recorder(folder, model, optimizer, second_moments=True) as recorder:
        for step in range(6):
            indices = torch.arange(step * 8, step * 8 + 8) % 24
            inputs, labels = taken(training, indices)
            optimizer.zero_grad()
            task.loss.batch(task.outputs(call(model, inputs)), labels).backward()
            recorder.batch(indices)
            optimizer.step()
    trajectory = Trajectory(folder)
    plan = make_plan(random_scores(model.eval(), 1), model, taken(test, range(2))[0], sparsity=0.5, structure=structure)
    keep, last = flat_mask(plan, trajectory.layout), trajectory.state(-1)
    end = torch.where(keep, last, torch.zeros_like(last))
    units = {name: kept for name, kept in plan.keep.items() if name in plan.groups}
    jump = Segment(len(trajectory), last, end, end - last, jump=True)
    return Case(task, model, trajectory, training, test, plan, PrunedPath("p", keep, units, (jump,), end), layer)
