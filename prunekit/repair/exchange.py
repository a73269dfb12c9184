"""Gradients of several ranks added up while the backward pass still goes on, tensor by tensor, in one order for all.

Ranks may get their gradients in different orders, and some tensor may get none on one of them (an expert that no sample of its
chose); what is added up together must be the same on all. So tensors have an order, several go in one piece, and a piece goes
when it and those before it are full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit import ranks

PIECE = 2**22
"""Numbers in one piece at least, where so many are left: 16 MiB in single precision."""
AHEAD = 2
"""Pieces that may be on their way at a time; their gradients are held until they come back."""


class Exchange:
    """One backward pass's gradients, the sum of all ranks' given to ``use``, in the tensors' own precision.

    Every rank sends ``2 (ranks - 1) / ranks`` times the gradients' bytes: with two ranks and single precision 4 bytes a weight.
    A process alone gives them on as they come, and holds none.

    Args:
        like: name -> a tensor of the gradient's shape, type and device, in the order in which gradients are expected.
        use: called once for every name; None stands for a gradient that nobody has, where there is one rank.
    """

    def __init__(self, like: Mapping[str, Tensor], use: Callable[[str, Tensor | None], None]) -> None:
        self._like, self._use = like, use
        self._alone = ranks.size() == 1
        self._pieces = [] if self._alone else _pieces(like)
        self._place = {name: number for number, piece in enumerate(self._pieces) for name in piece}
        self._missing = [len(piece) for piece in self._pieces]
        self._come: dict[str, Tensor] = {}
        self._sent: list[tuple[Any, Tensor]] = []
        self._next = self._used = 0

    def give(self, name: str, gradient: Tensor | None) -> None:
        """This rank's, once for every name."""
        if self._alone:
            self._use(name, gradient)
            return
        self._come[name] = torch.zeros_like(self._like[name]) if gradient is None else gradient
        self._missing[self._place[name]] -= 1
        while self._next < len(self._pieces) and not self._missing[self._next]:
            self._send()

    def finish(self) -> None:
        """Waits for what is on its way; every name was given."""
        while self._used < len(self._sent):
            self._take()

    def _send(self) -> None:
        if self._next - self._used >= AHEAD:
            self._take()
        flat = torch.cat([self._come.pop(name).reshape(-1) for name in self._pieces[self._next]])
        self._sent.append((ranks.adding(flat), flat))
        self._next += 1

    def _take(self) -> None:
        (work, flat), piece = self._sent[self._used], self._pieces[self._used]
        self._sent[self._used] = (None, flat[:0])
        self._used += 1
        work.wait()
        for name, part in zip(piece, flat.split([self._like[name].numel() for name in piece]), strict=True):
            self._use(name, part.view(self._like[name].shape))


def _pieces(like: Mapping[str, Tensor]) -> Sequence[Sequence[str]]:
    found: list[list[str]] = []
    numbers, kind = 0, None
    for name, tensor in like.items():
        if not found or numbers >= PIECE or kind != (tensor.dtype, tensor.device):
            found.append([])
            numbers, kind = 0, (tensor.dtype, tensor.device)
        found[-1].append(name)
        numbers += tensor.numel()
    return found
