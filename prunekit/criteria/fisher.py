"""Fisher: ``θ² · E[g²] / 2``, the loss that removing a weight costs in second order.

It is Optimal Brain Damage (LeCun et al. 1989) with the Hessian's diagonal taken from the empirical Fisher: per-sample gradients
of the loss at the true labels (Theis et al. 2018,
arXiv 1801.05787; Liu et al. 2021, arXiv 2108.00708, for groups).

A group's is ``E[(Σ_i θ_i g_i)²] / 2``: the Fisher's quadratic form for removing all of it, cross terms included.
"""

from __future__ import annotations

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.taylor import first_order


def _fisher(evidence: Evidence) -> CriterionResult:
    found = first_order(evidence, evidence.options.get("target", "loss"), "square")
    importance = {name: value / 2 for name, value in found.importance.items()}
    axes = {name: value * 0.5**0.5 for name, value in found.axis_sums.items()}  # so that its mean square is halved as well
    return CriterionResult(importance, axes, gradient_evaluations=found.gradient_evaluations)


CRITERION = Criterion(
    _fisher,
    "second-order cost by the empirical Fisher, θ²·E[g²]/2 (arXiv 1801.05787)",
    needs_data=True,
    spreads=True,
    group="sum",
    aggregation="square",
    accepts=("target",),
)
