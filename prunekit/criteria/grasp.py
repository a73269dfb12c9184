"""GraSP: ``θ · H g``, the gradient norm that a weight keeps up (Wang et al. 2020, arXiv 2002.07376), at the trained weights.

The paper removes the highest ``-θ ⊙ Hg`` (``H`` and ``g`` of the mean loss), whose removal lowers the squared
gradient norm least or even raises it; so ``θ ⊙ Hg`` is high for what stays. It has a sign: see ``signed.shifted`` for how it
becomes an importance of the same order. Made for untrained nets: near a minimum ``g``, and the scores with it, vanish.
The paper's softmax temperature of 200 is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.signed import shifted
from prunekit.errors import PrunekitError


def _grasp(evidence: Evidence) -> CriterionResult:
    gradient = _derivative(evidence, None)
    product = _derivative(evidence, gradient)
    return shifted(evidence.layout, evidence.state * product, evidence.prunable, 3 * len(evidence.samples()))


def _derivative(evidence: Evidence, direction: Tensor | None) -> Tensor:
    """The mean loss's gradient, or with a ``direction`` v its Hessian's product ``H v``, ``(P,)``; parameters only."""
    function, batches = evidence.batch_losses()
    theta = evidence.state.clone().to(function.device).requires_grad_()
    total = torch.zeros(theta.shape, dtype=torch.float64)
    moves = torch.zeros_like(theta)
    for entry in evidence.layout.parameters:
        moves[entry.span] = 1  # buffers are coordinates of the path, but no loss is minimised over them
    for (x, y), share in batches:
        value = function(theta, x, y).sum() * share
        try:
            (slope,) = torch.autograd.grad(value, theta, create_graph=direction is not None)
            if direction is not None:
                (slope,) = torch.autograd.grad(slope @ direction.to(theta.device), theta)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise PrunekitError(
                "grasp needs second derivatives of the loss, which this model does not have (an autograd function of its own, a "
                "recurrent or fused layer); take another criterion"
            ) from error
        total += (slope.detach() * moves).cpu()
    ranks.add_up([total])
    return total.to(theta.dtype)


CRITERION = Criterion(_grasp, "gradient flow kept up, θ·Hg (GraSP, arXiv 2002.07376)", needs_data=True, group="shift")
