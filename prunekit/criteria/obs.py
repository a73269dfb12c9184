"""OBS, layer by layer: ``θ_i² / [H⁻¹]_ii`` with ``H = Σ x xᵀ`` of the layer's inputs.

Optimal Brain Surgeon (Hassibi and Stork 1993), by layers: OBC (Frantar and Alistarh 2022, arXiv 2208.11580), SparseGPT (arXiv
2301.00774).

What the layer's squared output error grows by when weight ``i`` goes and the others of its output make up for it as well as
they can. ``H + λI`` is inverted, ``λ = damping × mean diagonal`` (0.01 by default; ``obs(damping=0.1)``). A group's is the sum of
its weights' (as if each went alone). ``prunekit.apply.compensate`` makes the kept weights do what this counts on.
Weights of linear layers and of
convolutions, transposed ones too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.criteria.by_inputs import scored_by_inputs
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.layer_inputs import of_products

DAMPING = 0.01


def _obs(evidence: Evidence) -> CriterionResult:
    damping = float(evidence.options.get("damping", DAMPING))

    def cost(rows: Tensor, gram: Tensor) -> Tensor:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        level = diagonal.mean(1)[:, None]
        reached = level > 0  # by any input: else no removal costs anything, and there is nothing to invert
        diagonal.add_(torch.where(reached, damping * level, torch.ones_like(level)))
        inverse = torch.linalg.inv(gram).diagonal(dim1=1, dim2=2)
        found: Tensor = rows.square() / inverse[:, None] * reached[..., None]
        return found

    return scored_by_inputs(evidence, "obs", of_products, cost, size=2, power=2)


CRITERION = Criterion(
    _obs,
    "layer-wise optimal brain surgeon, θ²/[H⁻¹]_ii (arXiv 2208.11580)",
    needs_data=True,
    by_inputs=True,
    spreads=True,
    group="l1",
    accepts=("damping",),
)
