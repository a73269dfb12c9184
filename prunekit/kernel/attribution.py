"""How much each weight contributed along a path: parameter-wise scores, chunk by chunk.

``ψ_i(x) = Σ_s U_{s,i} ∫ ∂_i f(x; θ_s + t D_s) dt`` (ExPLAIND, arXiv 2505.20076, the kernel's parameter-wise form;
docs/kernel.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.kernel.function import ModelFunction
from prunekit.kernel.gradients import choose_engine
from prunekit.kernel.quadrature import get_rule
from prunekit.trajectory.trajectory import Segment

SHARES: dict[str, Callable[[Segment], Tensor]] = {
    "kernel": lambda segment: segment.data_update,
    "regularisation": lambda segment: segment.regularisation,
    "whole": lambda segment: segment.update,
}

CACHE_CHUNK = 16  # samples at a time: larger chunks leave the processor's cache and run slower (measured)


@dataclass(frozen=True)
class Contribution:
    """Signed scores of one chunk: ``scores[name]`` is ``(samples, targets, *parameter shape)``."""

    samples: slice
    scores: dict[str, Tensor]


def attribute(
    function: ModelFunction,
    segments: Callable[[], Iterable[Segment]],
    x: Tensor,
    y: Tensor,
    *,
    nodes: int = 1,
    rule: str = "midpoint",
    share: str = "kernel",
    memory: int = 512 * 2**20,
    tick: Callable[[int], None] = lambda amount: None,
) -> Iterator[Contribution]:
    """Parameter-wise scores of the samples, in chunks that fit ``memory`` bytes.

    Args:
        function: the model and its target.
        segments: called once per chunk, gives the path's pieces in order.
        x, y: scoring samples and labels.
        nodes, rule: quadrature within each piece; one midpoint is enough to rank weights.
        share: ``"kernel"`` (U), ``"regularisation"`` (R) or ``"whole"`` (D).
        tick: called with the number of samples done, once per piece.
    """
    quadrature = get_rule(rule, nodes)
    entries = function.layout.parameters
    x, y = x.to(function.device), y.to(function.device)
    engine = targets = None
    begin = 0
    while begin < len(x):
        total: dict[str, Tensor] = {}
        chunk = slice(begin, begin)
        for segment in segments():
            start, end, moved = (v.to(function.device) for v in (segment.start, segment.end, SHARES[share](segment)))
            if engine is None or targets is None:
                engine, targets = choose_engine(function, end, x, y), function(end, x[:1], y[:1]).shape[1]
            if not total:
                one = targets * function.layout.total * start.element_size() * 3  # totals, gradients, a product
                chunk = slice(begin, min(len(x), begin + max(1, min(CACHE_CHUNK, memory // one))))
                total = {e.name: start.new_zeros(chunk.stop - chunk.start, targets, *e.shape) for e in entries}
            for node, weight in quadrature:
                scale = function.layout.views(moved * weight if weight != 1 else moved)
                engine.accumulate(torch.lerp(start, end, node), x[chunk], y[chunk], scale, total)
            tick(chunk.stop - chunk.start)
        yield Contribution(chunk, total)
        begin = chunk.stop
