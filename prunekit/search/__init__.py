"""Tries plans and measures them: compare, auto, budgets, sensitivity of layers, studies and the rivals in them."""

from prunekit.search.auto import choose
from prunekit.search.compare import Candidates, Comparison, compare
from prunekit.search.sensitivity import Sensitivity, sensitivity

__all__ = ["Candidates", "Comparison", "Sensitivity", "choose", "compare", "sensitivity"]
