"""KL of two models' answers and its gradient, in as few passes over the vocabulary and as little memory as they need.

The gradient of ``KL(p ‖ softmax(z))`` in the logits is ``softmax(z) - p``; autograd would get it through five more tensors of the
logits' size, which at a vocabulary of tens of thousands are most of a learning step's memory. Here one is made, the gradient;
what else is computed on the way is as long as a part of it, and written over part by part: on a CPU new pages cost more than what
is computed in them. It has no second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PARTS = {"cpu": 2**20}
PART = 2**25
"""Logits at a time, by device: what a processor's cache holds; elsewhere so many that kernels take longer than their starts."""


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reference: Tensor, logits: Tensor) -> Tensor:
        known, asked = _rows(reference), _rows(logits)
        rows = max(1, PARTS.get(known.device.type, PART) // max(1, known.shape[1]))
        scratch = [known.new_empty(min(rows, len(known)), known.shape[1]) for _ in range(2)]
        ruled_out = bool(known.numel()) and bool(known.amin() < math.log(torch.finfo(known.dtype).tiny))
        gradient, kl = torch.empty_like(known), known.new_empty(len(known))
        for first in range(0, len(known), rows):
            part = slice(first, first + rows)
            found = torch.log_softmax(asked[part].to(known.dtype), -1, out=gradient[part])
            p, difference = (one[: len(found)] for one in scratch)
            torch.exp(known[part], out=p)
            torch.sub(known[part], found, out=difference)
            if ruled_out:  # what the reference rules out adds nothing
                difference.masked_fill_(p == 0, 0)
            kl[part] = difference.mul_(p).sum(-1)
            found.exp_().sub_(p)
        ctx.save_for_backward(gradient.view(reference.shape))
        ctx.kind = logits.dtype
        return kl.view(reference.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient.mul_(slopes[0][..., None]).to(ctx.kind)  # in its place, so that there is one backward pass


def _rows(tensor: Tensor) -> Tensor:
    """``(places, classes)``."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def fused_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """``KL(exp(reference) ‖ softmax(logits))`` in nats along the last axis; ``reference`` are log-probabilities."""
    found: Tensor = _FusedKL.apply(reference, logits)
    return found
