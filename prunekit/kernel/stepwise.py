"""What each step of training did to the outputs: ``φ_s(x) · U_s`` and ``φ_s(x) · R_s``, by forward mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from prunekit.kernel.attribution import SHARES
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.quadrature import get_rule
from prunekit.trajectory.trajectory import Segment


def step_scores(
    function: ModelFunction,
    segments: Iterable[Segment],
    x: Tensor,
    y: Tensor,
    *,
    share: str = "kernel",
    nodes: int = 1,
    rule: str = "midpoint",
    tick: Callable[[int], None] = lambda amount: None,
) -> Tensor:
    """Step-wise scores, ``(pieces, samples, targets)``; over kernel and regularisation they sum to ``f_N - f_0``.

    Args:
        share: as in ``attribute``.
        tick: called once per piece.
    """
    x, y = x.to(function.device), y.to(function.device)
    rows = []
    for segment in segments:
        start, end, moved = (v.to(function.device) for v in (segment.start, segment.end, SHARES[share](segment)))
        slopes = [w * function.directional(torch.lerp(start, end, t), moved, x, y)[1] for t, w in get_rule(rule, nodes)]
        rows.append(torch.stack(slopes).sum(0))
        tick(1)
    return torch.stack(rows)
