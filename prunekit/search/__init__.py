"""Tries plans and measures them: compare, auto."""

from prunekit.search.auto import choose
from prunekit.search.compare import Candidates, Comparison, compare

__all__ = ["Candidates", "Comparison", "choose", "compare"]
