"""SNIP: ``|θ · ∂L/∂θ|`` of the mean loss (Lee et al. 2019, arXiv 1810.02340), here at the trained weights.

The paper divides by the sum over all weights, which changes no ranking and is left out. Single weights rank as in
``taylor``; a group's is the sum of its weights' absolute values, where ``taylor`` lets them cancel.
"""

from __future__ import annotations

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.gradient import from_gradient


def _snip(evidence: Evidence) -> CriterionResult:
    weights = evidence.weights()
    return from_gradient(evidence, lambda name, gradient: (weights[name] * gradient).abs())


CRITERION = Criterion(_snip, "connection sensitivity |θ·g| (SNIP, arXiv 1810.02340)", needs_data=True, spreads=True, group="l1")
