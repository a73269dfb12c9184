"""Influence along the training path: ExPLAIND (arXiv 2505.20076), per weight.

The paper's: ``importance_i = Σ_x Σ_c |ψ_i(x)_c|`` over scoring samples and outputs, with
``ψ_i(x) = Σ_s U_{s,i} ∫ ∂_i f(x; θ_s + t D_s) dt``: what the gradients' share of every step did to the output.
``share`` and ``aggregation`` give its relatives: the regularisation's share, the whole step, what of the kernel share
weight decay left until the end (``survival``), L2 over samples, and the signed mean, which with the loss as target is Loss
Change Allocation (Lan et al. 2019, arXiv 1909.01440).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from prunekit import ranks
from prunekit.batch import Inputs, Labels
from prunekit.criteria.additive import collect, contributions
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.data.sharing import Share, sharing
from prunekit.kernel import Contribution, ModelFunction, looked_at, score_error, targets_of
from prunekit.progress import Bar
from prunekit.trajectory import Segment


def _influence(evidence: Evidence) -> CriterionResult:
    function, samples = evidence.explained()
    targets = targets_of(function, evidence.trajectory.state(-1), *samples.rows(0, 1))
    few = samples.take(looked_at(len(samples)))
    error = _error(evidence, function, *few.rows(0, len(few)))
    gradients: list[int] = []

    def parts(own: Share, skip: int) -> Iterator[Contribution]:
        pieces = -(-evidence.trajectory.pieces // evidence.stride)
        with Bar("influence (samples × steps)", len(own.samples) * pieces) as bar:
            yield from contributions(
                function,
                own,
                targets,
                lambda: _segments(evidence),
                skip,
                evidence.memory,
                nodes=evidence.nodes,
                rule=evidence.rule,
                early=evidence.early,
                tolerance=evidence.tolerance,
                share=evidence.share,
                tick=bar.advance,
                evaluated=gradients.append,
            )

    shape = len(samples), targets
    with sharing(samples) as own:
        importance, axes = collect(
            partial(parts, own), shape, evidence.prunable, evidence.aggregation, evidence.partial, evidence.partial_key
        )
        return CriterionResult(importance, axes, {"error": error}, int(ranks.total(sum(gradients))))


def _segments(evidence: Evidence) -> Iterable[Segment]:
    trajectory, survival = evidence.trajectory, evidence.share == "survival"
    begin, end = evidence.phase or (0, None)
    yield from trajectory.segments(evidence.stride, begin=begin, end=end, survival=survival)
    if survival and not begin and end is None:  # what is left of the starting weights: Π θ_0 ∂f(x; θ_N)
        last = trajectory.state(-1)
        zero = torch.zeros_like(last)
        yield Segment(len(trajectory), last, last, zero, 0, trajectory.surviving_start())


def _error(evidence: Evidence, function: ModelFunction, x: Inputs, y: Labels) -> dict[str, float]:
    share = "kernel" if evidence.share == "survival" else evidence.share  # the same integrals, on unweighted steps
    return score_error(
        function,
        lambda: evidence.trajectory.segments(evidence.stride),
        x,
        y,
        nodes=evidence.nodes,
        rule=evidence.rule,
        early=evidence.early,
        share=share,
        count=-(-evidence.trajectory.pieces // evidence.stride),
    )


CRITERION = Criterion(
    _influence,
    "contribution of every training step, per sample and output (ExPLAIND, arXiv 2505.20076)",
    needs_path=True,
    needs_data=True,
    group="sum",
    accepts=("target", "share", "aggregation", "nodes"),
)
SURVIVAL = replace(
    CRITERION,
    describes="influence(share=survival): what weight decay left of it until the end",
    accepts=("target", "aggregation", "nodes"),
    preset={"share": "survival"},
)
LCA = replace(
    CRITERION,
    describes="influence(target=loss,share=whole,aggregation=abs_mean): Loss Change Allocation (arXiv 1909.01440)",
    accepts=("nodes",),
    preset={"target": "loss", "share": "whole", "aggregation": "mean"},
)
