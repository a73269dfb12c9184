"""Movement: ``Σ_s U_{s,i} θ_{s,i}``, weights that training moved away from 0 stay (Sanh et al. 2020, arXiv 2005.07683).

The paper adds up ``-a_s (∂L/∂w_i)(θ_s) θ_{s,i}`` while fine-tuning. ``-a_s ∂L/∂w`` is what
plain SGD's gradient did to the weight at step ``s``, which is the recorded path's data update ``U_s``, weight decay left out;
for momentum and Adam ``U_s`` is what the gradients did through them. No mask is trained along with the weights here.

It has a sign: see ``signed.shifted`` for how it becomes an importance of the same order. Needs no data.
"""

from __future__ import annotations

import torch

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.signed import shifted


def _movement(evidence: Evidence) -> CriterionResult:
    begin, end = evidence.phase or (0, None)
    total = torch.zeros_like(evidence.trajectory.state(0), dtype=torch.float64)
    for segment in evidence.trajectory.segments(evidence.stride, begin=begin, end=end):
        total += (segment.data_update * segment.start).double()
    return shifted(evidence.layout, total, evidence.prunable)


CRITERION = Criterion(_movement, "movement away from 0 along the path (arXiv 2005.07683)", needs_path=True, group="shift")
