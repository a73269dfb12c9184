"""Wanda: ``|θ_ij| · ‖x_j‖₂``, the norm of input ``j`` over all scoring samples and positions (Sun et al. 2023, arXiv 2306.11695).

The square root of ``obs`` with off-diagonal moments left out. The paper compares the weights of one output with one another
and removes the same share of each: who competes with whom is the allocation's business here; this is the metric. A group's is
the L2 norm, ``sqrt(Σ θ²‖x‖²)``. Linear, Conv1d and Conv2d weights.
"""

from __future__ import annotations

import torch

from prunekit.batch import to
from prunekit.criteria.evidence import Criterion, Evidence, Found
from prunekit.criteria.layer_inputs import Moments, check_seen, collecting, layers_of

BATCH = 256


def input_moments(evidence: Evidence, what: str) -> dict[str, Moments]:
    """Second moments of the inputs of every prunable weight's layer, at the weights to score, on the CPU.

    Raises:
        PrunekitError: a prunable parameter is not a Linear or convolution weight, or no input reached it.
    """
    function = evidence.function("outputs")
    theta = evidence.state.to(function.device)
    with torch.no_grad(), collecting(layers_of(function.model, evidence.prunable, what)) as moments:
        for x, y in evidence.samples():
            function(theta, to(x, function.device), to(y, function.device))
    check_seen(moments, evidence.prunable, what)
    return {name: Moments(found.gram.cpu()) for name, found in moments.items()}


def _wanda(evidence: Evidence) -> Found:
    weights, importance = evidence.weights(), {}
    for name, found in input_moments(evidence, "wanda").items():
        norms = found.gram.diagonal(dim1=1, dim2=2).sqrt()
        metric = found.rows_of(weights[name]).abs() * norms[:, None]
        importance[name] = metric.reshape(weights[name].shape).to(weights[name].dtype)
    return Found({name: importance[name] for name in evidence.prunable})


CRITERION = Criterion(_wanda, "weight times norm of its input (Wanda, arXiv 2306.11695)", needs_data=True)
