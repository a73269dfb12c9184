"""Taylor and Fisher by plain autograd, from nothing but the model, its data and its task: what scores are checked against."""

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


def scoring(entry: Entry) -> Any:
    """The scoring samples as one batch, as a DataLoader would give it."""
    split = entry.data()["scoring"]
    return split if isinstance(split, tuple) else default_collate([split[i] for i in range(len(split))])


def taylor(model: nn.Module, entry: Entry) -> dict[str, Tensor]:
    """``|θ · ∂L/∂θ|`` of the loss of all scoring samples, by parameter."""
    gradients = _gradients(model, loss(model, scoring(entry), entry))
    return {name: (parameter * gradients[name]).abs().detach() for name, parameter in model.named_parameters()}


def fisher(model: nn.Module, entry: Entry) -> dict[str, Tensor] | None:
    """``Σ_n (θ · ∂L_n/∂θ)²``, one sample after another; None where samples weigh differently in the loss."""
    if entry.task not in WHOLE:
        return None
    batch = scoring(entry)
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for index in range(_size(batch)):
        gradients = _gradients(model, loss(model, _one(batch, index), entry))
        for name, parameter in model.named_parameters():
            found[name] += (parameter * gradients[name]).detach() ** 2
    return found


def loss(model: nn.Module, batch: Any, entry: Entry) -> Tensor:
    """The batch's mean loss, as a user would write it for this one model."""
    if entry.task in OWN_LOSS:
        return model(**batch).loss
    if isinstance(batch, Mapping):
        answer, labels = model(**{key: value for key, value in batch.items() if key != "labels"}), batch["labels"]
    else:
        inputs, labels = batch
        answer = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    if entry.loss is not None:
        return load_object(entry.loss, "loss")(tuple(answer.values()) if isinstance(answer, Mapping) else answer, labels)
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


def _one(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    if isinstance(batch, Mapping):
        return {key: _one(value, index) for key, value in batch.items()}
    return type(batch)(_one(value, index) for value in batch)
