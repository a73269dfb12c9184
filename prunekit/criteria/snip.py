"""SNIP: ``|θ · ∂L/∂θ|`` of the mean loss (Lee et al. 2019, arXiv 1810.02340), here at the trained weights.

The paper divides by the sum over all weights, which changes no ranking and is left out. Single weights rank as in
``taylor``; a group's is the sum of its weights' absolute values, where ``taylor`` lets them cancel.
"""

from __future__ import annotations

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.gradient import mean_loss_gradient


def _snip(evidence: Evidence) -> CriterionResult:
    weights, gradient = evidence.weights(), mean_loss_gradient(evidence)
    importance = {name: (weights[name] * gradient[name]).abs() for name in evidence.prunable}
    return CriterionResult(importance, gradient_evaluations=len(evidence.samples()))


CRITERION = Criterion(_snip, "connection sensitivity |θ·g| (SNIP, arXiv 1810.02340)", needs_data=True, group="l1")
