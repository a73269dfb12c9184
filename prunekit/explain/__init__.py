"""The kernel's account of a pruned model, and explanations of parts, samples and prunings, as JSON values."""

from prunekit.explain.account import account, dense_reconstruction
from prunekit.explain.diff import explain_diff
from prunekit.explain.evaluation import EvaluationRecord
from prunekit.explain.part import Part, explain_part, find_part
from prunekit.explain.path import PrunedPath
from prunekit.explain.removal import RemovalEffect, explain_removal, explain_removals, flat_mask, units_of
from prunekit.explain.removal_record import RemovalRecord
from prunekit.explain.sample import explain_sample, explain_training_sample
from prunekit.explain.timeline import Timeline, timeline
from prunekit.explain.training import Training
from prunekit.explain.view import View

__all__ = [
    "EvaluationRecord", "Part", "PrunedPath", "RemovalEffect", "RemovalRecord", "Timeline", "Training", "View", "account",
    "dense_reconstruction", "explain_diff", "explain_part", "explain_removal", "explain_removals", "explain_sample",
    "explain_training_sample", "find_part", "flat_mask", "timeline", "units_of",
]  # fmt: skip
