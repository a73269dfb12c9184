"""LAMP: ``θ_i² / Σ_{j: |θ_j| ≥ |θ_i|} θ_j²`` within a layer (Lee et al. 2021, arXiv 2010.07611).

A weight's share of what would be left of its layer if everything smaller were gone. It is comparable across layers as it is
(use allocation ``global``), and every layer's largest weight scores 1, so none is emptied before all others.

A group's is the same of squared L2 norms within its layer of groups; the file keeps the magnitudes for that (``Scores.parts``).
"""

from __future__ import annotations

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.group_scores import lamp
from prunekit.criteria.identity import state_digest
from prunekit.criteria.magnitude import magnitudes
from prunekit.criteria.scores import Scores


def _lamp(evidence: Evidence) -> CriterionResult:
    sizes = magnitudes(evidence).importance
    facts = {
        "criterion": "magnitude", "group": "l2", "aggregation": None, "trajectory": evidence.trajectory.hash,
        "model": state_digest(evidence.state), "prunable": list(evidence.prunable),
    }  # fmt: skip
    importance = {name: lamp(size.double().square()).to(size.dtype) for name, size in sizes.items()}
    return CriterionResult(importance, parts=(Scores(sizes, {}, facts),))


CRITERION = Criterion(
    _lamp,
    "layer-adaptive magnitude (LAMP, arXiv 2010.07611)",
    spreads=True,
    group="lamp",
    silent_on=("layers",),  # a block has nothing beside it in its layer: its share would always be 1
)
