"""prunekit: make a trained model smaller, and see why each weight stayed or went."""

import os
import sys

# ``python -m prunekit`` puts the working folder first on the path; inside a run folder its files would pass for
# libraries. What a user's own modules need is added again, last and never from a run folder (prunekit/imports.py).
if ("-m", "prunekit") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from prunekit.apply import hold_masks, load, masked, prune, save, squeeze
from prunekit.criteria import CRITERIA, Scores, score
from prunekit.errors import ArtifactError, NonFiniteError, PrunekitError, StructureError, UsageError
from prunekit.plan import Plan, make_plan
from prunekit.repair import refine
from prunekit.steps import Finetuning, Planner, RefineAgain, Schedule, cut, finetune, prune_by_schedule
from prunekit.task import TASKS, Task
from prunekit.trajectory import Recorder, Trajectory
from prunekit.version import __version__

__all__ = [
    "CRITERIA", "TASKS", "ArtifactError", "Finetuning", "NonFiniteError", "Plan", "Planner", "PrunekitError", "Recorder",
    "RefineAgain", "Schedule", "Scores", "StructureError", "Task", "Trajectory", "UsageError", "__version__", "cut", "finetune",
    "hold_masks", "load", "make_plan", "masked", "prune", "prune_by_schedule", "refine", "save", "score", "squeeze",
]  # fmt: skip
