"""Gradient: ``|∂L/∂θ|`` of the mean loss over the scoring samples, at the trained weights."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.criteria.evidence import Criterion, Evidence, Found


def mean_loss_gradient(evidence: Evidence, batch: int = 256) -> dict[str, Tensor]:
    """Gradient of the mean loss over all scoring samples, by parameter name."""
    x, y = evidence.samples()
    function = evidence.function("outputs")
    function.target = evidence.loss
    theta = evidence.state.clone().to(function.device).requires_grad_()
    total = torch.zeros_like(theta)
    for begin in range(0, len(x), batch):
        part = slice(begin, begin + batch)
        value = function(theta, x[part].to(function.device), y[part].to(function.device))
        total += torch.autograd.grad(value, theta)[0] * (len(x[part]) / len(x))
    return evidence.layout.views(total.cpu())


def _gradient(evidence: Evidence) -> Found:
    gradient = mean_loss_gradient(evidence)
    return Found({name: gradient[name].abs() for name in evidence.prunable})


CRITERION = Criterion(_gradient, "absolute gradient of the mean loss", needs_data=True)
