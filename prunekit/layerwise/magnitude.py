"""Magnitude: the smallest weights of a layer go, its inputs are not looked at."""

from __future__ import annotations

from prunekit.layerwise.amount import Amount
from prunekit.layerwise.method import Method, Problem, Solved


def solve(problem: Problem, amount: Amount) -> Solved:
    keep = amount.keep(problem.weight.abs())
    return Solved(problem.weight * keep, keep)


METHOD = Method(solve, None, "layer", changes=False, describes="the smallest weights go")
