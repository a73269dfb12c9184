"""What a layer-wise method is: how it solves one layer, and what it needs to know of that layer's inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.layerwise.amount import Amount


@dataclass(frozen=True)
class Problem:
    """One layer: which weights go, and what becomes of the others, so that its outputs change little.

    Attributes:
        weight: ``(groups, outputs / groups, d)``, see ``prunekit.criteria.layer_inputs``.
        moments: over all rows of inputs ``Σ x²`` ``(groups, d)`` or ``Σ x xᵀ`` ``(groups, d, d)``, as the method asks; empty
            where it asks for none.
        damping: share of the mean of ``Σ x²`` that is added to each, which holds weights where samples say little.
    """

    weight: Tensor
    moments: Tensor
    damping: float

    def curvature(self) -> Tensor:
        """``H = Σ x xᵀ``, damped, ``(groups, d, d)``; the identity for inputs that are all 0."""
        mean = self.moments.diagonal(dim1=1, dim2=2).mean(1)
        level = torch.where(mean > 0, self.damping * mean, torch.ones_like(mean))
        return self.moments + torch.diag_embed(level[:, None].expand(self.moments.shape[:2]))


@dataclass(frozen=True)
class Solved:
    """``weight`` with 0 where ``keep`` is False, both of the problem's shape."""

    weight: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Method:
    """A layer-wise method; to add one, write a file with a ``METHOD`` and enter it in ``prunekit.layerwise``.

    Attributes:
        solve: ``(problem, amount) -> solved``.
        moments: what is summed over a layer's inputs: ``squares``, ``products``, or nothing.
        within: what its weights are compared within unless told, as its paper has it; see ``Amount``.
        changes: whether weights that stay get other values.
        describes: one line for help texts and docs.
    """

    solve: Callable[[Problem, Amount], Solved]
    moments: Literal["squares", "products"] | None
    within: str
    changes: bool
    describes: str


def factored(matrix: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factors of ``(groups, d, d)``, computed in double precision.

    Raises:
        PrunekitError: inputs depend on one another, and the damping is too small to tell their weights apart.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    if bool(info.any()):
        raise PrunekitError(f"its inputs depend on one another, and damping is {damping:g}; give a larger one, such as 0.01")
    return factor
