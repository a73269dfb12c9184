"""Which numbers of a model's output are explained: a plain dict from name to target."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.errors import UsageError, nearest

Target = Callable[[Tensor, Tensor], Tensor]
"""``(outputs (samples, ...), labels (samples, ...)) -> (samples, targets)``; each row depends on its own sample only."""


def outputs(out: Tensor, labels: Tensor) -> Tensor:
    """Every output, of every position for sequences: ``(samples, outputs)``."""
    return out.reshape(len(out), -1)


def log_prob(out: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the true class: ``(samples, 1)``, or one a position: ``(samples, positions)``."""
    return F.log_softmax(out, -1).gather(-1, labels[..., None])[..., 0].reshape(len(out), -1)


def margin(out: Tensor, labels: Tensor) -> Tensor:
    """True class's logit minus the largest other one: ``(samples, 1)``, or one a position."""
    true = out.gather(-1, labels[..., None])[..., 0]
    others = out.scatter(-1, labels[..., None], float("-inf"))
    return (true - others.amax(-1)).reshape(len(out), -1)


def cross_entropy(out: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample, the mean over positions for sequences: ``(samples, 1)``."""
    return -log_prob(out, labels).mean(1, keepdim=True)


def divergence(out: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ model) per sample in nats, the mean over positions for sequences: ``(samples, 1)``.

    Args:
        reference: another model's log-probabilities, of ``out``'s shape, where other targets take labels. A class that it rules
            out (minus infinity) adds nothing.
    """
    out_of_it = reference == -torch.inf
    found = F.log_softmax(out, -1).masked_fill(out_of_it, 0)
    kl = (reference.exp() * (reference.masked_fill(out_of_it, 0) - found)).sum(-1)
    return kl.reshape(len(out), -1).mean(1, keepdim=True)


TARGETS: dict[str, Target] = {"outputs": outputs, "log_prob": log_prob, "margin": margin, "loss": cross_entropy}


def get_target(target: str | Target) -> Target:
    """Looks a target up by name; a function is taken as it is.

    Raises:
        UsageError: unknown name.
    """
    if callable(target):
        return target
    if target not in TARGETS:
        raise UsageError(f"target {target!r} does not exist; {nearest(target, list(TARGETS))}")
    return TARGETS[target]


def from_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Target:
    """Makes a per-sample target ``(samples, 1)`` of a loss that averages over its batch."""

    def per_sample(out: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([loss(o[None], y[None]) for o, y in zip(out, labels, strict=True)])[:, None]

    return cross_entropy if loss is F.cross_entropy else per_sample
