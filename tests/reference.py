"""Plain code that tests compare with: outputs over all batches, figures of classes, KL as a target."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.measure import accuracy, agreement, kl


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs and labels over all batches, in evaluation mode; the model's mode is put back."""
    training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pairs = [(model(x.to(device)).cpu(), y) for x, y in batches]
    model.train(training)
    return torch.cat([out for out, _ in pairs]), torch.cat([y for _, y in pairs])


def fidelity(outputs: Tensor, labels: Tensor, reference: Tensor) -> dict[str, float]:
    """Accuracy, and agreement with and KL to the reference model."""
    return {
        "accuracy": accuracy(outputs, labels),
        "agreement": agreement(outputs, reference),
        "kl": kl(outputs, reference),
    }


def kl_target(out: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ model) per sample, ``(samples, 1)``, from the reference's log-probabilities."""
    kl = (reference.exp() * (reference - F.log_softmax(out, -1))).sum(-1)
    return kl.reshape(len(out), -1).mean(1, keepdim=True)
