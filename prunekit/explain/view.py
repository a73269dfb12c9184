"""A recorded model looked at on some samples: what of its outputs is explained, and how that is summed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.batch import Inputs, Labels, size, take, to
from prunekit.data.identity import tensors
from prunekit.explain.answers import answers_of, class_labels, class_outputs, label_of, outputs_at
from prunekit.kernel import ModelFunction, step_scores
from prunekit.task import Target, Task, get_task
from prunekit.trajectory import Segment, Trajectory

COLUMNS = 50  # outputs that have a row of their own, where there are no classes
QUANTITIES = {
    "outputs": "the outputs",
    "log_prob": "the target log_prob (the log-probability of a sample's labels)",
    "margin": "the target margin (the label's output less the largest other one, the mean over a sample's places)",
    "loss": "the target loss (a sample's own)",
}


def centred(out: Tensor, labels: Labels) -> Tensor:
    """Each output less the mean of all of them: what is added to all alike changes no answer."""
    return out - out.mean(-1, keepdim=True)


def _centred(task: Task) -> Target:
    return lambda out, labels: centred(class_outputs(task, out), labels)


@dataclass(frozen=True)
class Asked:
    """One number that is explained of some samples (see ``prunekit.explain.asked``).

    Attributes:
        weights: ``(samples, targets)``; the number is the weighted sum of the view's values.
        target: its name.
        says: what it is, for text.
        samples: how many of the view's samples it is about; others are only compared with.
        by_place: what the view's values are one a place of, ``log_prob`` or ``margin``; empty where the target is no sum of such.
    """

    weights: Tensor
    target: str
    says: str
    samples: int
    by_place: str = ""


@dataclass(frozen=True)
class View:
    """A recorded model looked at on some samples.

    Attributes:
        function: its target is ``centred`` for classifiers, else the task's own.
        x, y: the samples' inputs and labels; their split and numbers are the caller's to tell.
        classifies: whether there is one class a sample; else the task's own target is explained.
        nodes, rule, stride: quadrature of a step of training, and kept states a piece.
        asked: the number that sums the view up; see ``own`` where nobody asks for one.
    """

    function: ModelFunction
    trajectory: Trajectory
    x: Inputs
    y: Labels
    classifies: bool
    nodes: int = 1
    rule: str = "midpoint"
    stride: int = 1
    asked: Asked | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        trajectory: Trajectory,
        x: Inputs,
        y: Labels,
        device: torch.device | str = "cpu",
        task: str | Task | None = None,
        **options: Any,
    ) -> View:
        """Looks at the model's outputs and labels to tell whether there is one class a sample.

        Args:
            task: what the model is for; classification when None.
        """
        kind = get_task(task)
        function = ModelFunction(model, trajectory.layout, trajectory.fixed, kind.target, device, task=kind)
        x, y = to(x, function.device), to(y, function.device)
        few = slice(0, 1)
        out = outputs_at(function, trajectory.state(-1), take(x, few), take(y, few, size(x)))
        classifies = class_labels(kind, out, y) is not None
        if classifies:
            function.target = _centred(kind)
        return cls(function, trajectory, x, y, classifies, **options)

    @property
    def task(self) -> Task:
        return self.function.task

    @property
    def count(self) -> int:
        """How many samples."""
        return size(self.x)

    @property
    def looked(self) -> int:
        """How many samples are explained: all but those that are only compared with."""
        return self.count if self.asked is None else self.asked.samples

    @cached_property
    def labels(self) -> Tensor:
        """One class a sample, ``(samples,)``; only where it ``classifies``."""
        found = self.task.classes(self.y)
        assert found is not None
        return found

    def answers(self, state: Tensor) -> list[Any]:
        """What the model at ``state`` answers to each sample, see ``prunekit.explain.answers``."""
        return answers_of(self.task, outputs_at(self.function, state, self.x, self.y), self.y)

    def label(self, k: int = 0) -> Any:
        """A sample's label, see ``prunekit.explain.answers``."""
        return int(self.labels[k]) if self.classifies else label_of(self.y, k, self.count)

    @property
    def about(self) -> dict[str, Any]:
        """What is explained where there is not one class a sample: ``task``, ``target`` and a ``note``; empty for classes."""
        if self.asked is not None:
            valued = {} if self.classifies else {"task": self.task.name, "target": self.asked.target}
            return {"asked": self.asked.target, **valued}
        if self.classifies:
            return {}
        name = self.task.name
        return {
            "task": name,
            "target": self.task.target,
            "note": f"the task {name} has not one class a sample, so no table is by class; explained is its target "
            f"{self.task.target}, summed over all that a sample has of it",
        }

    @torch.no_grad()
    def values(self, state: Tensor) -> Tensor:
        """``f(x; state)``, ``(samples, targets)``."""
        return self.function(state.to(self.function.device), self.x, self.y)

    @cached_property
    def own(self) -> Tensor:
        """Weights ``(samples, targets)`` of the one number that sums a view up: the mean over samples of the label's output

        (of all outputs' sum where there is no one label); what is asked for, where something is."""
        if self.asked is not None:
            return self.asked.weights
        targets = self.values(self.trajectory.state(0)).shape[1]
        weights = torch.full((self.count, targets), 1 / self.count, dtype=self.trajectory.state(0).dtype)
        if self.classifies:
            weights *= self.labels.cpu()[:, None] == torch.arange(targets)
        return weights.to(self.function.device)

    def segments(self) -> Iterable[Segment]:
        return self.trajectory.segments(self.stride)

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the view, beside the trajectory."""
        data = checkpoint.digest(tensors((self.x, self.y)))
        facts = self.task.facts()
        return {
            "data": data, "nodes": self.nodes, "rule": self.rule, "stride": self.stride, **({"task": facts} if facts else {})
        }  # fmt: skip

    @property
    def pieces(self) -> int:
        return -(-self.trajectory.pieces // self.stride)

    def moved(self, segment: Segment, share: str, mask: Tensor | None, nodes: int | None = None) -> Tensor:
        """What a piece's share did to the outputs through ``mask``: ``(samples, targets)``, float64."""
        found = step_scores(
            self.function, [segment], self.x, self.y, share=share, only=mask, nodes=nodes or self.nodes, rule=self.rule
        )
        return found[0].double()

    def classes(self, values: Tensor) -> list[tuple[int, float, float]]:
        """``(class, mean of its output over its samples, over the others)`` of the classes that have samples.

        Without classes by output, where there are several and few enough to be told; else nothing.
        """
        found: list[tuple[int, float, float]] = []
        target = self.task.target if self.asked is None else self.asked.target
        if not self.classifies and (target != "outputs" or not 1 < values.shape[1] <= COLUMNS):
            return found
        for c in range(values.shape[1]):
            mine = self._mine(c, values.device)
            if mine.any():
                found.append((c, float(values[mine, c].mean()), float(values[~mine, c].mean()) if (~mine).any() else 0.0))
        return found

    def queries(self, classes: Sequence[int]) -> Tensor:
        """Weights ``(classes, samples, targets)`` of the means that ``classes()`` gives first; without any, ``own`` alone."""
        whole = self.own
        rows = []
        for c in classes:
            mine = self._mine(c, whole.device)
            row = torch.zeros_like(whole)
            row[mine, c] = 1 / float(mine.sum())
            rows.append(row)
        return torch.stack(rows) if rows else whole[None]

    def _mine(self, c: int, device: torch.device) -> Tensor:
        return self.labels == c if self.classifies else torch.ones(self.count, dtype=torch.bool, device=device)


def quantity(view: View) -> str:
    """What a view explains, for text."""
    if view.asked is not None:
        return view.asked.says
    if view.classifies:
        return "a class's output less the mean of all outputs (what moves all alike changes no answer)"
    return QUANTITIES.get(view.task.target, f"the target {view.task.target}")
