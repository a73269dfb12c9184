"""Repairs a plan by what its removal broke: refine, masks learnt, units that change places, what is lowered meanwhile."""

from prunekit.repair.patterns import PATTERNS
from prunekit.repair.refine import refine

__all__ = ["PATTERNS", "refine"]
