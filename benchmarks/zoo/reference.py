"""Taylor, Fisher and measures by plain code, from the model, its data and its task alone: what cells are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks.zoo.entry import Entry
from prunekit.imports import load_object

WHOLE = ("classification", "regression", "binary", "multi_label", "heads")  # a sample is one answer: all weigh the same
OWN_LOSS = ("causal_lm", "masked_lm", "seq2seq")  # the model computes it itself when it is given labels


def whole(entry: Entry, name: str = "scoring") -> Any:
    """A split as one batch, as a DataLoader would give it."""
    split = entry.data()[name]
    return split if isinstance(split, tuple) else default_collate([split[i] for i in range(len(split))])


def taylor(model: nn.Module, entry: Entry) -> dict[str, Tensor]:
    """``|θ · ∂L/∂θ|`` of the loss of all scoring samples, by parameter."""
    gradients = _gradients(model, loss(model, whole(entry), entry))
    return {name: (parameter * gradients[name]).abs().detach() for name, parameter in model.named_parameters()}


def fisher(model: nn.Module, entry: Entry) -> dict[str, Tensor] | None:
    """``Σ_n (θ · ∂L_n/∂θ)²``, one sample after another; None where samples weigh differently in the loss."""
    if entry.task not in WHOLE:
        return None
    batch = whole(entry)
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for index in range(_size(batch)):
        model.train().eval()  # some models keep what they computed from their weights until their mode changes
        gradients = _gradients(model, loss(model, _twice(batch, index), entry))
        for name, parameter in model.named_parameters():
            found[name] += (parameter * gradients[name]).detach() ** 2
    return found


@torch.no_grad()
def measure(model: nn.Module, entry: Entry) -> tuple[str, float] | None:
    """A measure of the test samples by its name in eval.json; None for tasks that have none which everybody agrees on."""
    batch = whole(entry, "test")
    if entry.task in OWN_LOSS:
        return "perplexity", float(loss(model, batch, entry).exp())
    if entry.task == "regression":
        return "rmse", float(loss(model, batch, entry).sqrt())
    if entry.task not in ("classification", "token_classification", "segmentation", "binary"):
        return None
    answer, labels = _answered(model, batch)
    outputs = _logits(answer)
    if entry.task == "binary":
        right = (outputs > 0) == (labels > 0.5)
    else:
        right = (outputs.argmax(-1 if entry.task == "token_classification" else 1) == labels)[labels != -100]
    return "accuracy", float(right.double().mean())


def loss(model: nn.Module, batch: Any, entry: Entry) -> Tensor:
    """The batch's mean loss, as a user would write it for this one model."""
    if entry.task in OWN_LOSS:
        return model(**batch).loss
    answer, labels = _answered(model, batch)
    if entry.loss is not None:
        return load_object(entry.loss, "loss")(_heads(answer, entry), labels)
    outputs = _logits(answer)
    if entry.task == "token_classification":
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())
    if entry.task == "regression":
        return F.mse_loss(outputs, labels)
    if entry.task in ("binary", "multi_label"):
        return F.binary_cross_entropy_with_logits(outputs, labels)
    return F.cross_entropy(outputs, labels)


def proportional(found: Tensor, expected: Tensor) -> float:
    """How far two scores are from a constant multiple of each other: the distance of the two, each of length 1."""
    found, expected = found.double().flatten(), expected.double().flatten()
    return float((found / found.norm().clamp(min=1e-300) - expected / expected.norm().clamp(min=1e-300)).norm())


def _answered(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"}), batch["labels"]
    inputs, labels = batch
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs), labels


def _heads(answer: Any, entry: Entry) -> Any:
    return tuple(answer[key] for key in entry.options["heads"]) if "heads" in entry.options else answer


def _logits(answer: Any) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, Mapping):
        return answer["out"] if "out" in answer else answer["logits"]
    return answer.logits


def _gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def _size(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)


def _twice(batch: Any, index: int) -> Any:
    """One sample two times, whose mean loss is its own: torch 2.13 has a wrong gradient for one sample alone (docs/kernel.md)."""
    if isinstance(batch, Tensor):
        return batch[[index, index]]
    if isinstance(batch, Mapping):
        return {key: _twice(value, index) for key, value in batch.items()}
    return type(batch)(_twice(value, index) for value in batch)
