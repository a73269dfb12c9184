"""Integrated gradients towards removal, as a criterion: after SInGE (Yvinec et al., NeurIPS 2022, arXiv 2207.04089).

SInGE scales one neuron at a time down to 0 and integrates the size of its gradient's effect on the way. Here a whole layer
goes at a time, and single weights are scored: ``∫_0^1 |θ_i ∂_i L(θ with layer scaled by t)| dt``, L the mean loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.kernel import mean_gradient
from prunekit.kernel.quadrature import get_rule
from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights


def integrated_gradients(pattern: Weights, objective: Objective, seed: int = 0, *, nodes: int = 8) -> Tensor:
    """The pattern's count of largest scores; ``layers × nodes`` backward passes of the objective's ranking target."""
    theta, layout = objective.theta, objective.ranking.layout
    worth = torch.zeros_like(theta)
    for entry in layout.parameters:
        if entry.name not in pattern.names:
            continue
        for node, weight in get_rule("midpoint", nodes):
            scaled = theta.clone()
            scaled[entry.span] *= node
            gradient = mean_gradient(objective.ranking, scaled, objective.labelled)[1]
            worth[entry.span] += weight * (theta * gradient)[entry.span].abs()
    return pattern.select(pattern.gather(worth, pattern.keep))
