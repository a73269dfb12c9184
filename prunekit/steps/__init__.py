"""Prunes in steps: schedules, fine-tuning between them, and refining again what was fine-tuned."""

from prunekit.steps.again import Again
from prunekit.steps.finetune import Finetuning, Tuner, finetune
from prunekit.steps.planner import Given, Planner, leaves
from prunekit.steps.schedule import SCHEDULES, Pruned, Schedule, cut, prune_by_schedule

__all__ = [
    "SCHEDULES", "Again", "Finetuning", "Given", "Planner", "Pruned", "Schedule", "Tuner", "cut", "finetune", "leaves",
    "prune_by_schedule",
]  # fmt: skip
