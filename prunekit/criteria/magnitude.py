"""Magnitude: ``|θ|`` (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from prunekit.criteria.evidence import Criterion, Evidence, Found


def _magnitude(evidence: Evidence) -> Found:
    weights = evidence.weights()
    return Found({name: weights[name].abs() for name in evidence.prunable})


CRITERION = Criterion(_magnitude, "absolute weight (arXiv 1506.02626)")
