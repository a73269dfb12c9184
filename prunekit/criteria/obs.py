"""OBS, layer by layer: ``θ_i² / [H⁻¹]_ii`` with ``H = Σ x xᵀ`` of the layer's inputs (Optimal Brain Surgeon, Hassibi and Stork
1993; OBC, Frantar and Alistarh 2022, arXiv 2208.11580; SparseGPT, arXiv 2301.00774).

What the layer's squared output error grows by when weight ``i`` goes and the others of its output make up for it as well as
they can. ``H + λI`` is inverted, ``λ = damping × mean diagonal`` (0.01 by default; ``obs(damping=0.1)``). A group's is the sum of
its weights' (as if each went alone). ``prunekit.apply.compensate`` makes the kept weights do what this counts on.
Linear, Conv1d and Conv2d weights.
"""

from __future__ import annotations

import torch

from prunekit.criteria.evidence import Criterion, Evidence, Found
from prunekit.criteria.wanda import input_moments

DAMPING = 0.01


def _obs(evidence: Evidence) -> Found:
    damping = float(evidence.options.get("damping", DAMPING))
    weights, importance = evidence.weights(), {}
    for name, found in input_moments(evidence, "obs").items():
        gram, weight = found.gram, weights[name]
        level = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        reached = level > 0  # by any input: else no removal costs anything, and there is nothing to invert
        damped = gram + damping * level * torch.eye(gram.shape[1], dtype=gram.dtype)
        inverse = torch.linalg.inv(torch.where(reached, damped, torch.eye(gram.shape[1], dtype=gram.dtype)))
        cost = found.rows_of(weight).square() / inverse.diagonal(dim1=1, dim2=2)[:, None] * reached
        importance[name] = cost.reshape(weight.shape).to(weight.dtype)
    return Found({name: importance[name] for name in evidence.prunable})


CRITERION = Criterion(
    _obs,
    "layer-wise optimal brain surgeon, θ²/[H⁻¹]_ii (arXiv 2208.11580)",
    needs_data=True,
    group="l1",
    accepts=("damping",),
)
