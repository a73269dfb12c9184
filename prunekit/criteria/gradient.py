"""Gradient: ``|∂L/∂θ|`` of the mean loss over the scoring samples, at the trained weights."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence


def mean_loss_gradient(evidence: Evidence) -> dict[str, Tensor]:
    """Gradient of the mean loss over all scoring samples, by parameter name."""
    function, batches = evidence.batch_losses()
    theta = evidence.state.to(function.device)
    total = torch.zeros(theta.shape, dtype=torch.float64)
    for (x, y), share in batches:
        total += function.gradient(theta, x, y, theta.new_full((), share))[1].cpu()
    ranks.add_up([total])
    return evidence.layout.views(total.to(theta.dtype))


def _gradient(evidence: Evidence) -> CriterionResult:
    gradient = mean_loss_gradient(evidence)
    found = {name: gradient[name].abs() for name in evidence.prunable}
    return CriterionResult(found, gradient_evaluations=len(evidence.samples()))


CRITERION = Criterion(_gradient, "absolute gradient of the mean loss", needs_data=True)
