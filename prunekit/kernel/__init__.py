"""The exact path kernel: targets, per-sample gradients, quadrature, attribution, reconstruction."""

from prunekit.kernel.attribution import SHARES, Contribution, attribute, score_error
from prunekit.kernel.datawise import DataScores, data_scores
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.quadrature import RULES, get_rule
from prunekit.kernel.reconstruction import Reconstruction, masked_machine, reconstruct, shares_by_layer
from prunekit.kernel.stepwise import layer_step_scores, layers_of, step_scores
from prunekit.kernel.targets import TARGETS, Target, from_loss, get_target

__all__ = [
    "RULES", "SHARES", "TARGETS", "Contribution", "DataScores", "ModelFunction", "Reconstruction", "Target", "attribute",
    "data_scores", "from_loss", "get_rule", "get_target", "layer_step_scores", "layers_of", "masked_machine", "reconstruct",
    "score_error", "shares_by_layer", "step_scores",
]  # fmt: skip
