"""Gradient: ``|∂L/∂θ|`` of the mean loss over the scoring samples, at the trained weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.criteria.evidence import Criterion, Evidence, Found


def mean_loss(evidence: Evidence) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor, Tensor]:
    """``(θ, inputs, labels) -> scalar``, and the scoring samples and labels on the evidence's device."""
    x, y = evidence.samples()
    function = evidence.function("outputs")
    function.target = evidence.loss
    return function, x.to(function.device), y.to(function.device)


def mean_loss_gradient(evidence: Evidence, batch: int = 256) -> dict[str, Tensor]:
    """Gradient of the mean loss over all scoring samples, by parameter name."""
    loss, x, y = mean_loss(evidence)
    theta = evidence.state.clone().to(x.device).requires_grad_()
    total = torch.zeros_like(theta)
    for begin in range(0, len(x), batch):
        part = slice(begin, begin + batch)
        value = loss(theta, x[part], y[part])
        total += torch.autograd.grad(value, theta)[0] * (len(x[part]) / len(x))
    return evidence.layout.views(total.cpu())


def _gradient(evidence: Evidence) -> Found:
    gradient = mean_loss_gradient(evidence)
    found = {name: gradient[name].abs() for name in evidence.prunable}
    return Found(found, gradient_evaluations=len(evidence.samples()[0]))


CRITERION = Criterion(_gradient, "absolute gradient of the mean loss", needs_data=True)
