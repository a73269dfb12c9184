"""Influence along the training path: ExPLAIND (arXiv 2505.20076), its kernel share per weight.

``importance_i = Σ_x Σ_c |ψ_i(x)_c|`` over scoring samples and outputs, with
``ψ_i(x) = Σ_s U_{s,i} ∫ ∂_i f(x; θ_s + t D_s) dt``: what the gradients' share of every step did to the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from prunekit.criteria.additive import collect
from prunekit.criteria.evidence import Criterion, Evidence
from prunekit.kernel import Contribution, attribute
from prunekit.progress import Bar


def _influence(evidence: Evidence) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trajectory = evidence.trajectory
    x, y = evidence.samples()

    def parts() -> Iterator[Contribution]:
        pieces = -(-len(trajectory) // evidence.stride)
        with Bar("influence (samples × steps)", len(x) * pieces) as bar:
            yield from attribute(
                evidence.function(),
                partial(trajectory.segments, evidence.stride),
                x,
                y,
                nodes=evidence.nodes,
                memory=evidence.memory,
                tick=bar.advance,
            )

    return collect(parts(), evidence.prunable, "l1")


CRITERION = Criterion(
    _influence,
    "kernel share of every training step, per sample and output (ExPLAIND, arXiv 2505.20076)",
    needs_path=True,
    needs_data=True,
    group="sum",
    aggregation="l1",
)
