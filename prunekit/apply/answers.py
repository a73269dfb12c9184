"""Whether a pruned model still answers: what was a number in the dense model's answer is one in its own."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.batch import Inputs, called, named
from prunekit.errors import NonFiniteError
from prunekit.measure.undisturbed import placed, undisturbed


@torch.no_grad()
def check_answers(dense: nn.Module, pruned: nn.Module, inputs: Inputs) -> None:
    """Runs both on a few samples.

    Raises:
        NonFiniteError: a part of the pruned model's answer holds NaN where the dense one's does not; names the part.
    """
    answers = []
    for model in (dense, pruned):
        with undisturbed(model):
            answers.append(named(called(model, placed(model, inputs)), "outputs"))
    for name, tensor in answers[1].items():
        before = answers[0].get(name)
        if before is None or not tensor.is_floating_point() or not bool(tensor.isnan().any()):
            continue
        if not bool(before.isnan().any()):
            raise NonFiniteError(
                f"the pruned model's {name} holds NaN, the dense model's does not: too little is left of what it is computed "
                "from; prune less, keep a share of every layer (floor), or leave those parameters out (ignore)"
            )
