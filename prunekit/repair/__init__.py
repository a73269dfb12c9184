"""Repairs a plan by what its removal broke: refine, masks learnt, units that change places, what is lowered meanwhile."""

from prunekit.repair.refine import RefineOptions, refine
from prunekit.repair.swaps import SWAPS
from prunekit.repair.together import learn_together
from prunekit.repair.track import Recording

__all__ = ["SWAPS", "Recording", "RefineOptions", "learn_together", "refine"]
