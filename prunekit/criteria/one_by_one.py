"""Units that leave one after the other: which is the cheapest next, when what stays makes up for all that went.

Of a layer with weights ``W``, ``(outputs, d)``, whose change ``ΔW`` costs ``½ tr(G ΔW H ΔWᵀ)``, ``H`` of inputs and ``G`` of
outputs, the columns ``J`` of a unit cost ``½ tr(Q_JJ [H⁻¹]_JJ⁻¹)``, ``Q = Wᵀ G W``, when the other columns change as well as they
can (Optimal Brain Surgeon for a set: Hassibi and Stork 1993; by these factors LLM Surgeon, arXiv 2312.17244). Then ``H⁻¹`` and
``Q`` are those of what stays, and so on to the last unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.progress import track


@dataclass
class Reader:
    """One layer, or one group of a grouped one, that reads units.

    Attributes:
        inverse: ``H⁻¹``, ``(d, d)``, float64; overwritten. A last column that belongs to no unit (the bias's) never leaves.
        quadratic: ``Q = Wᵀ G W``, ``(d, d)``; overwritten.
        units: which units have columns here, ``(n,)``.
        columns: theirs, ``(n, block)``.
    """

    inverse: Tensor
    quadratic: Tensor
    units: Tensor
    columns: Tensor

    def costs(self) -> Tensor:
        """``tr(Q_JJ [H⁻¹]_JJ⁻¹)`` of each of its units, ``(n,)``."""
        if self.columns.shape[1] == 1:
            column = self.columns[:, 0]
            alone: Tensor = self.quadratic.diagonal()[column] / self.inverse.diagonal()[column]
            return alone
        rows, columns = self.columns[:, :, None], self.columns[:, None, :]
        found: Tensor = (self.quadratic[rows, columns] * torch.linalg.inv(self.inverse[rows, columns])).sum((1, 2))
        return found

    def remove(self, unit: int) -> None:
        """Takes a unit's columns out, and lets the others make up for them."""
        (where,) = torch.nonzero(self.units == unit, as_tuple=True)
        if not len(where):
            return
        gone = self.columns[where[0]]
        spread = self.inverse[:, gone]  # what stays moves by -spread · share, of W's columns that go
        share = torch.linalg.solve(self.inverse[gone][:, gone], spread.T)
        self.inverse -= spread @ share
        across = self.quadratic[:, gone] @ share
        self.quadratic += share.T @ self.quadratic[gone][:, gone] @ share - across - across.T
        for matrix in (self.inverse, self.quadratic):
            matrix[gone] = 0
            matrix[:, gone] = 0
        self.inverse[gone, gone] = 1

    def halved(self, left: Tensor) -> Reader:
        """The same without the columns of units that are gone, once these are half of all: every removal costs ``d²``.

        Args:
            left: which units are left, of all.
        """
        stays = left[self.units]
        if 2 * int(stays.sum()) > len(stays):
            return self
        kept = torch.ones(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        kept[self.columns[~stays].flatten()] = False
        place = kept.cumsum(0) - 1
        return Reader(self.inverse[kept][:, kept], self.quadratic[kept][:, kept], self.units[stays], place[self.columns[stays]])


def costs_in_turn(readers: Sequence[Reader], count: int, what: str) -> Tensor:
    """What each of ``count`` units costs when its turn comes, ``(count,)``, float64; their order is that in which they leave.

    A unit that costs less than one before it, which it then leaves right after, counts as much as that: the greatest so far.

    Args:
        readers: all that read them; overwritten.
        what: for the progress bar.
    """
    device = readers[0].inverse.device
    left = torch.ones(count, dtype=torch.bool, device=device)
    found = torch.zeros(count, dtype=torch.float64)
    so_far = 0.0
    readers = list(readers)
    for _ in track(range(count), what, count):
        now = torch.zeros(count, dtype=torch.float64, device=device)
        for reader in readers:
            now.index_add_(0, reader.units, reader.costs().clamp_min(0))
        cost, unit = torch.where(left, now, torch.inf).min(0)
        so_far = max(float(cost), so_far * (1 + 1e-9))
        found[unit], left[unit] = so_far, False
        for reader in readers:
            reader.remove(int(unit))
        readers = [reader.halved(left) for reader in readers]
    return found / 2
