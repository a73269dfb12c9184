"""Wanda: weights of an output go by ``|w_j| · ‖x_j‖₂``, none of the others changes (Sun et al. 2023, arXiv 2306.11695).

Norms of the inputs are all that it needs of the samples, so that its moments take one number an input.
"""

from __future__ import annotations

from prunekit.layerwise.amount import Amount
from prunekit.layerwise.method import Method, Problem, Solved


def solve(problem: Problem, amount: Amount) -> Solved:
    keep = amount.keep(problem.weight.abs() * problem.moments.sqrt()[:, None])
    return Solved(problem.weight * keep, keep)


METHOD = Method(solve, "squares", "rows", changes=False, describes="weight times norm of its input, compared within an output")
