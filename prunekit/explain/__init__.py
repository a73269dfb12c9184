"""The kernel's account of a pruned model, and explanations of parts, samples and prunings, as JSON values."""

from prunekit.explain.account import account, dense_reconstruction
from prunekit.explain.asked import ask
from prunekit.explain.diff import explain_diff
from prunekit.explain.errors import Errors, explain_errors, find_errors
from prunekit.explain.evaluation import EvaluationRecord
from prunekit.explain.part import Part, explain_part, find_part
from prunekit.explain.path import PrunedPath
from prunekit.explain.ranking import coordinate_scores, explain_ranking, inside
from prunekit.explain.removal import RemovalEffect, explain_removal, explain_removals, flat_mask, units_of
from prunekit.explain.removal_record import RemovalRecord
from prunekit.explain.sample import explain_sample, explain_training_sample
from prunekit.explain.timeline import Timeline, timeline
from prunekit.explain.training import Training
from prunekit.explain.view import View

__all__ = [
    "Errors", "EvaluationRecord", "Part", "PrunedPath", "RemovalEffect", "RemovalRecord", "Timeline", "Training", "View",
    "account", "ask", "coordinate_scores", "dense_reconstruction", "explain_diff", "explain_errors", "explain_part",
    "explain_ranking", "explain_removal", "explain_removals", "explain_sample", "explain_training_sample", "find_errors",
    "find_part", "flat_mask", "inside", "timeline", "units_of",
]  # fmt: skip
