"""KL of two models' answers and its gradient, in as few passes over the vocabulary as they need.

The gradient of ``KL(p ‖ softmax(z))`` in the logits is ``softmax(z) - p``; autograd would get it through five more tensors of the
logits' size, which at a vocabulary of tens of thousands are most of a learning step's memory. It has no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reference: Tensor, logits: Tensor) -> Tensor:
        found = F.log_softmax(logits.to(reference.dtype), -1)
        p = reference.exp()
        difference = reference - found
        if bool((out_of_it := p == 0).any()):  # what the reference rules out adds nothing, also where its logarithm is -inf
            difference.masked_fill_(out_of_it, 0)
        kl: Tensor = torch.linalg.vecdot(p, difference)
        ctx.save_for_backward(found.exp_().sub_(p))
        ctx.kind = logits.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        (difference,) = ctx.saved_tensors
        return None, (difference * slopes[0][..., None]).to(ctx.kind)


def fused_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """``KL(exp(reference) ‖ softmax(logits))`` in nats along the last axis; ``reference`` are log-probabilities."""
    found: Tensor = _FusedKL.apply(reference, logits)
    return found
