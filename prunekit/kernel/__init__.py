"""The exact path kernel: targets, per-sample gradients, quadrature, attribution, reconstruction."""

from prunekit.kernel.attribution import SHARES, Contribution, attribute, score_error
from prunekit.kernel.blame import Blame, blame, mean_gradient, mean_value, second_moments
from prunekit.kernel.datawise import DataScores, data_scores
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.quadrature import RULES, get_rule
from prunekit.kernel.reconstruction import Reconstruction, masked_machine, reconstruct, shares_by_layer
from prunekit.kernel.stepwise import layer_step_scores, layers_of, step_scores
from prunekit.kernel.targets import TARGETS, Target, divergence, from_loss, get_target

__all__ = [
    "RULES", "SHARES", "TARGETS", "Blame", "Contribution", "DataScores", "ModelFunction", "Reconstruction", "Target",
    "attribute", "blame", "data_scores", "divergence", "from_loss", "get_rule", "get_target", "layer_step_scores", "layers_of",
    "masked_machine", "mean_gradient", "mean_value", "reconstruct", "score_error", "second_moments", "shares_by_layer",
    "step_scores",
]  # fmt: skip
