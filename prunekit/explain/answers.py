"""What a model answers, for people: a class where the task has one a sample, else its first values; labels in the same way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels, split, take
from prunekit.kernel import ModelFunction
from prunekit.task import Binary, Task

FEW = 8  # values of a label or an answer that are written
AT_A_TIME = 256


@torch.no_grad()
def outputs_at(function: ModelFunction, state: Tensor, x: Inputs, y: Labels) -> Tensor:
    """The outputs ``(samples, ...)`` that count, whatever the function's own target is, with the model at ``state`` ``(P,)``."""
    found: list[Tensor] = []

    def note(outputs: Tensor, labels: Labels) -> Tensor:
        found.append(outputs)
        return outputs.reshape(len(outputs), -1)

    other, state = copy.copy(function), state.to(function.device)
    other.target = note
    for inputs, labels in split((x, y), AT_A_TIME):
        other(state, inputs, labels)
    return torch.cat(found)


def class_outputs(task: Task, outputs: Tensor) -> Tensor:
    """One output a class, ``(samples, classes)``: as they are, or 0 beside the one logit of yes or no (the same by softmax)."""
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if isinstance(task, Binary) else outputs


def class_labels(task: Task, outputs: Tensor, labels: Labels) -> Tensor | None:
    """One class a sample ``(samples,)``, where the task has that and the outputs are of classes; else None.

    Args:
        outputs: of any of the samples.
    """
    if labels is None or outputs.dim() != 2 or (outputs.shape[1] < 2 and not isinstance(task, Binary)):
        return None
    return task.classes(labels)


def label_of(labels: Labels, k: int, samples: int) -> Any:
    """A sample's label as JSON values: a number, or the first few of its numbers (see ``text_of``)."""
    return told(take(labels, slice(k, k + 1), samples))


def answers_of(task: Task, outputs: Tensor, labels: Labels) -> list[Any]:
    """What the model answers to each sample, as JSON values: a class, the class of every place, or the outputs' first values."""
    if class_labels(task, outputs, labels) is not None:
        found: list[Any] = class_outputs(task, outputs).argmax(1).tolist()
        return found
    axis = _class_axis(task, outputs, labels)
    return [told(row) for row in (outputs if axis is None else outputs.argmax(axis)).split(1)]


def _class_axis(task: Task, outputs: Tensor, labels: Labels) -> int | None:
    """Where classes lie in outputs that have one for every place."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or outputs.dim() != labels.dim() + 1:
        return None
    axes = [getattr(task, "class_axis", None) or 1, 1, -1]
    return next((axis for axis in axes if outputs.movedim(axis, -1).shape[:-1] == labels.shape), None)


def told(nest: Any) -> Any:
    """One sample's part of a nest as JSON values; of many numbers ``FEW`` and one more, which says that there are more."""
    if isinstance(nest, Mapping):
        return {str(key): told(value) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        return [told(value) for value in nest]
    if not isinstance(nest, Tensor):
        return nest
    values = nest.flatten()[: FEW + 1].tolist()
    return values[0] if len(values) == 1 else values


def text_of(value: Any) -> str:
    """A label or an answer as text: ``3``, ``0.513``, ``0.513, 2.1, …``."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {text_of(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(text_of, value[:FEW])) + (", …" if len(value) > FEW else "")
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def divergence_name(task: Task) -> str | None:
    """What ``task.divergence`` is, for text; None for the KL of classes, which need not be told."""
    return None if any(m.name == "kl" for m in task.closeness) else "mean squared distance of the outputs"
