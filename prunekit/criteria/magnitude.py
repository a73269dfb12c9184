"""Magnitude: ``|θ|`` (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from torch import Tensor

from prunekit.criteria.evidence import Criterion, Evidence


def _magnitude(evidence: Evidence) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = evidence.weights()
    return {name: weights[name].abs() for name in evidence.prunable}, {}


CRITERION = Criterion(_magnitude, "absolute weight (arXiv 1506.02626)")
