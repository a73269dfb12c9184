"""Tries plans and measures them: compare, auto, refine."""

from prunekit.search.auto import choose
from prunekit.search.compare import Candidates, Comparison, compare
from prunekit.search.patterns import PATTERNS
from prunekit.search.refine import refine

__all__ = ["PATTERNS", "Candidates", "Comparison", "choose", "compare", "refine"]
