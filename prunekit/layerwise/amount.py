"""How much of one layer goes, and so which of its weights once each has a worth: by output, over the layer, or N of every M."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.plan.patterns import nm_mask
from prunekit.structure import Pattern

WITHIN = ("rows", "layer")


@dataclass(frozen=True)
class Amount:
    """What every layer loses.

    Attributes:
        sparsity: share that goes, in [0, 1).
        within: ``rows``: every output loses ``round(sparsity × inputs)``; ``layer``: weights of all outputs compete.
        pattern: N of every M consecutive weights of an output stay, whatever ``within`` says.
    """

    sparsity: float
    within: str
    pattern: Pattern | None = None

    def keep(self, worth: Tensor) -> Tensor:
        """True for what stays of a whole layer: where ``worth`` is largest, ties by position; boolean of its shape.

        Args:
            worth: ``(groups, outputs, inputs)``.
        """
        if self.pattern is not None:
            flat = worth.flatten(0, 1)
            return nm_mask(flat, self.pattern.first, self.pattern.second).view(worth.shape)
        return self.keep_some(worth, 0, worth.shape[2])

    def keep_some(self, worth: Tensor, begin: int, end: int) -> Tensor:
        """The same for the columns ``begin`` to ``end`` alone, ``(groups, outputs, end - begin)``; without a pattern.

        What goes of all columns up to ``end`` is the sparsity's share of these, rounded: parts that follow one another lose
        together what the whole would.
        """
        compared = worth.flatten(0, 1) if self.within == "rows" else worth.reshape(1, -1)
        outputs = 1 if self.within == "rows" else worth.shape[0] * worth.shape[1]
        gone = round(self.sparsity * outputs * end) - round(self.sparsity * outputs * begin)
        return ~smallest(compared, gone).view(worth.shape)


def smallest(values: Tensor, count: int) -> Tensor:
    """The ``count`` smallest of each row of ``values`` ``(rows, n)``, of equals the first, as a mask."""
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if values.is_cuda and len(values) == 1:  # one block of threads would select from a long row; all of them sort it
        threshold = values.sort(1).values[:, count - 1 : count]
    else:
        threshold = values.kthvalue(count, 1, keepdim=True).values
    found = values <= threshold
    if bool((found.sum(1) > count).any()):
        below, level = values < threshold, values == threshold
        found = below | (level & (level.cumsum(1) <= count - below.sum(1, keepdim=True)))
    return found
