"""How good a model's answers are, and how close to another's. Shapes: outputs ``(samples, classes)``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs and labels over all batches, in evaluation mode; the model's mode is put back."""
    training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pairs = [(model(x.to(device)).cpu(), y) for x, y in batches]
    model.train(training)
    return torch.cat([out for out, _ in pairs]), torch.cat([y for _, y in pairs])


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest output is the label."""
    return float((outputs.argmax(-1) == labels).float().mean())


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Share of samples with the same largest output."""
    return float((outputs.argmax(-1) == reference.argmax(-1)).float().mean())


def divergence(outputs: Tensor, reference: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(reference ‖ outputs) of the softmax distributions, in nats."""
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(outputs.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def fidelity(outputs: Tensor, labels: Tensor, reference: Tensor) -> dict[str, float]:
    """Accuracy, and agreement with and KL to the reference model."""
    return {
        "accuracy": accuracy(outputs, labels),
        "agreement": agreement(outputs, reference),
        "kl": divergence(outputs, reference),
    }
