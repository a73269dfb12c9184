"""The exact path kernel: targets, per-sample gradients, quadrature, attribution, reconstruction."""

from prunekit.kernel.attribution import SHARES, Contribution, attribute, looked_at, score_error, targets_of
from prunekit.kernel.blame import Batches, Blame, blame, mean_gradient, mean_value, samples_in, second_moments
from prunekit.kernel.datawise import DataScores, data_scores
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.quadrature import RULES, get_rule
from prunekit.kernel.reconstruction import Reconstruction, masked_machine, reconstruct, shares_by_layer
from prunekit.kernel.stepwise import layer_step_scores, layers_of, step_scores

__all__ = [
    "RULES", "SHARES", "Batches", "Blame", "Contribution", "DataScores", "ModelFunction", "Reconstruction", "attribute", "blame",
    "data_scores", "get_rule", "layer_step_scores", "layers_of", "looked_at", "masked_machine", "mean_gradient", "mean_value",
    "reconstruct", "samples_in", "score_error", "second_moments", "shares_by_layer", "step_scores", "targets_of",
]  # fmt: skip
