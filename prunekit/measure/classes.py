"""How good answers about classes are, and how close to another model's. Classes lie on the last axis of the outputs here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest output is the label."""
    return float((outputs.argmax(-1) == labels).float().mean())


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Share of samples with the same largest output."""
    return float((outputs.argmax(-1) == reference.argmax(-1)).float().mean())


def kl(outputs: Tensor, reference: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(reference ‖ outputs) of the softmax distributions, in nats."""
    return float(kl_each(outputs, reference).mean())


divergence = kl
"""Its name in scripts that are older than ``Task.divergence``."""


def kl_each(outputs: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ outputs) at every place, float64, ``outputs``' shape without its last axis.

    A class that the reference rules out (minus infinity) adds nothing.
    """
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(outputs.double(), -1)
    difference = p - q
    if bool((ruled_out := torch.isneginf(p)).any()):
        difference = difference.masked_fill(ruled_out, 0)
    found: Tensor = torch.linalg.vecdot(p.exp(), difference)
    return found
