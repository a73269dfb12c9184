"""Magnitude: ``|θ|`` (Han et al. 2015, arXiv 1506.02626).

A group's is the L2 norm of its weights, or with ``group=l1`` the sum of their absolute values (Li et al. 2017, arXiv
1608.08710, who take the layer's own filter alone; here the group's weights in the layers behind it count as well).
"""

from __future__ import annotations

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence


def magnitudes(evidence: Evidence) -> CriterionResult:
    weights = evidence.weights()
    return CriterionResult({name: weights[name].abs() for name in evidence.prunable})


CRITERION = Criterion(magnitudes, "absolute weight (arXiv 1506.02626)", spreads=True, accepts=("group",))
