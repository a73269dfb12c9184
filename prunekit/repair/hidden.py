"""The distance between two models' hidden states, block by block, as something to lower."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Labels
from prunekit.errors import UsageError
from prunekit.repair.live import blocks_of


class HiddenStates:
    """``Σ_places |h - h*|² / Σ_places |h*|²`` of every sample, the mean over the blocks of the longest ``nn.ModuleList``.

    A block's hidden state is what it gives, or the first of several things. Places whose label does not count are left out, where
    labels are one a place.

    Args:
        dense: whose hidden states are to be stayed close to.
        pruned: of the same architecture, whose runs call the target.
        ignore: the label of places that do not count.

    Raises:
        UsageError: the model has no list of modules, or its blocks give no tensors.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, ignore: int = -100) -> None:
        self._ignore = ignore
        many = len(blocks_of(dense))
        # At most one run's: a run whose target is another's, such as the first look's, keeps no more.
        self._seen: dict[bool, deque[Tensor]] = {False: deque(maxlen=many), True: deque(maxlen=many)}
        self._hooks = [
            block.register_forward_hook(partial(self._note, mine))
            for mine, model in ((False, dense), (True, pruned))
            for block in blocks_of(model)
        ]

    def close(self) -> None:
        """Leaves both models as they were."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, mine: bool, block: nn.Module, given: Any, found: Any) -> None:
        state = found[0] if isinstance(found, tuple | list) else found
        if not isinstance(state, Tensor):
            raise UsageError(f"target hidden: a block gives {type(state).__name__}, not a tensor of hidden states")
        self._seen[mine].append(state.clone())  # the next block may change it in place

    def reference(self) -> tuple[Tensor, ...]:
        """What the dense model's blocks gave since this was last asked."""
        found = tuple(state.detach() for state in self._seen[False])
        self._seen[False].clear()
        return found

    def __call__(self, outputs: Tensor, labels: Labels) -> Tensor:
        """``(samples, 1)``; ``labels`` are ``(reference(), labels)``."""
        reference, true = labels
        mine = tuple(self._seen[True])
        self._seen[True].clear()
        total = outputs.new_zeros(len(outputs))
        for state, aim in zip(mine, reference, strict=True):
            error, size = ((_whole(state) - _whole(aim)).float().square().sum(-1), aim.float().square().sum(-1))
            if isinstance(true, Tensor) and true.shape == error.shape:
                counted = (true != self._ignore).to(error)
                error, size = error * counted, size * counted
            total = total + error.flatten(1).sum(1) / size.flatten(1).sum(1).clamp_min(torch.finfo(size.dtype).tiny)
        return (total / max(1, len(reference)))[:, None]


def _whole(state: Tensor) -> Tensor:
    """In single precision at least: what is left of a difference of two in half precision is mostly rounding."""
    return state.to(torch.promote_types(state.dtype, torch.float32))
