"""A model's outputs over all batches, for figures that benchmarks compute themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekit.batch import Batch
from prunekit.measure import accuracy, agreement, kl
from prunekit.task import Classification
from prunekit.task.evaluation import run


def predict(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Outputs and labels, in evaluation mode; the model's mode is put back."""
    task = Classification()
    pairs = [(run(model, batch, task).cpu(), batch[1]) for batch in batches]
    return torch.cat([out for out, _ in pairs]), torch.cat([y for _, y in pairs])


def fidelity(outputs: Tensor, labels: Tensor, reference: Tensor) -> dict[str, float]:
    """Accuracy, and agreement with and KL to the reference model."""
    return {
        "accuracy": accuracy(outputs, labels),
        "agreement": agreement(outputs, reference),
        "kl": kl(outputs, reference),
    }
