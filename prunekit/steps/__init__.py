"""Prunes in steps: schedules, fine-tuning between them, and refining again what was fine-tuned."""

from prunekit.steps.again import RefineAgain
from prunekit.steps.by_schedule import Pruned, cut, prune_by_schedule
from prunekit.steps.finetune import Finetuning, Tuner, finetune
from prunekit.steps.planner import GivenPlan, Planner, leaves
from prunekit.steps.rate import ByDivergence, ByLoss
from prunekit.steps.schedule import SCHEDULES, Schedule

__all__ = [
    "SCHEDULES", "ByDivergence", "ByLoss", "Finetuning", "GivenPlan", "Planner", "Pruned", "RefineAgain", "Schedule", "Tuner",
    "cut", "finetune", "leaves", "prune_by_schedule",
]  # fmt: skip
