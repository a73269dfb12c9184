"""prunekit: make a trained model smaller, and see why each weight stayed or went."""

from prunekit.apply import hold_masks, load, masked, prune, save
from prunekit.criteria import CRITERIA, Scores, score
from prunekit.errors import ArtifactError, NonFiniteError, PrunekitError, StructureError, UsageError
from prunekit.plan import Plan, make_plan
from prunekit.trajectory import Recorder, Trajectory
from prunekit.version import __version__

__all__ = [
    "CRITERIA", "ArtifactError", "NonFiniteError", "Plan", "PrunekitError", "Recorder", "Scores", "StructureError",
    "Trajectory", "UsageError", "__version__", "hold_masks", "load", "make_plan", "masked", "prune", "save", "score",
]  # fmt: skip
