"""Tries plans and measures them: compare, auto. Prunes in steps, and fine-tunes: schedules."""

from prunekit.search.auto import choose
from prunekit.search.compare import Candidates, Comparison, compare
from prunekit.search.finetune import Finetuning, Tuner, finetune
from prunekit.search.planner import Given, Planner
from prunekit.search.schedule import SCHEDULES, Pruned, Schedule, cut, prune_by_schedule

__all__ = [
    "SCHEDULES", "Candidates", "Comparison", "Finetuning", "Given", "Planner", "Pruned", "Schedule", "Tuner", "choose",
    "compare", "cut", "finetune", "prune_by_schedule",
]  # fmt: skip
