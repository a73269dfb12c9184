"""Wanda: ``|θ_ij| · ‖x_j‖₂``, the norm of input ``j`` over all scoring samples and positions (Sun et al. 2023, arXiv 2306.11695).

The square root of ``obs`` with off-diagonal moments left out, so that it needs one number an input. The paper compares the
weights of one output with one another and removes the same share of each: who competes with whom is the allocation's business
here; this is the metric. A group's is the L2 norm, ``sqrt(Σ θ²‖x‖²)``. Weights of linear layers and of convolutions, transposed
ones too.
"""

from __future__ import annotations

from prunekit.criteria.by_inputs import scored_by_inputs
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.layer_inputs import of_squares


def _wanda(evidence: Evidence) -> CriterionResult:
    return scored_by_inputs(
        evidence, "wanda", of_squares, lambda rows, squares: rows.abs() * squares.sqrt()[:, None], size=1, power=1
    )


CRITERION = Criterion(
    _wanda, "weight times norm of its input (Wanda, arXiv 2306.11695)", needs_data=True, by_inputs=True, spreads=True
)
