"""Tries plans and measures them: compare, auto, sensitivity of layers. Repairs them: refine. Prunes in steps: schedules."""

from prunekit.search.again import Again
from prunekit.search.auto import choose
from prunekit.search.compare import Candidates, Comparison, compare
from prunekit.search.finetune import Finetuning, Tuner, finetune
from prunekit.search.patterns import PATTERNS
from prunekit.search.planner import Given, Planner, leaves
from prunekit.search.refine import refine
from prunekit.search.schedule import SCHEDULES, Pruned, Schedule, cut, prune_by_schedule
from prunekit.search.sensitivity import sensitivity

__all__ = [
    "PATTERNS", "SCHEDULES", "Again", "Candidates", "Comparison", "Finetuning", "Given", "Planner", "Pruned", "Schedule", "Tuner",
    "choose", "compare", "cut", "finetune", "leaves", "prune_by_schedule", "refine", "sensitivity",
]  # fmt: skip
