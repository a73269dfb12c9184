"""Taylor, first order: ``|θ · ∂L/∂θ|`` of the mean loss (Molchanov et al. 2019, arXiv 1906.10771).

It is the attribution of the straight segment from θ to 0 with one node at its beginning, so it is computed by the
same code as influence and its group scores are exact sums as well.

``taylor`` alone is the absolute value of the signed mean over samples (``abs_mean``): samples that disagree cancel.
``aggregation=l1``, ``l2`` or ``square`` take each sample's (and target's) change for itself; ``target`` takes another
function than the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from prunekit import ranks
from prunekit.criteria.additive import collect, contributions, spacing_of
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence, Spread
from prunekit.criteria.scores import summed_axes
from prunekit.data.sharing import Share, sharing
from prunekit.kernel import Contribution, targets_of
from prunekit.progress import Bar
from prunekit.trajectory import Segment


def first_order(evidence: Evidence, target: str, aggregation: str) -> CriterionResult:
    """Signed scores ``-θ_i ∂_i f(x)``, what removing a weight adds to ``f`` in first order, aggregated.

    Args:
        target: a name that the task has; ``loss`` is the task's own.
        aggregation: a name from ``AGGREGATIONS``.
    """
    if evidence.spread is not None:
        return _by_parts(evidence, evidence.spread, aggregation)
    function, samples = evidence.explained(target)
    theta = evidence.state
    targets = targets_of(function, theta, *samples.rows(0, 1))
    to_zero = Segment(0, theta, torch.zeros_like(theta), torch.zeros_like(theta))
    gradients: list[int] = []

    def parts(own: Share, skip: int) -> Iterator[Contribution]:
        with Bar("first order (samples)", len(own.samples)) as bar:
            yield from contributions(
                function,
                own,
                targets,
                lambda: [to_zero],
                skip,
                evidence.memory,
                rule="left",
                tick=bar.advance,
                evaluated=gradients.append,
            )

    with sharing(samples) as own:
        importance, axes = collect(partial(parts, own), (len(samples), targets), evidence.prunable, aggregation)
        return CriterionResult(importance, axes, gradient_evaluations=int(ranks.total(sum(gradients))))


def _by_parts(evidence: Evidence, spread: Spread, aggregation: str) -> CriterionResult:
    """The same of the target ``loss``, for a model that is spread: each sample by itself, part by part."""
    loss, samples, weights = evidence.spread_loss(spread), evidence.samples().bounded(1), evidence.weights()

    def parts(skip: int) -> Iterator[Contribution]:
        for _, number, gradients in spread.backward(samples, lambda outputs, labels, _: loss(outputs, labels)):
            signed = {name: (weights[name].to(found.device) * found).neg()[None, None] for name, found in gradients.items()}
            yield Contribution(slice(number, number + 1), slice(0, 1), signed)

    spacing = spacing_of(evidence.layout, evidence.state.itemsize, len(samples))
    importance, axes = collect(parts, (len(samples), 1), evidence.prunable, aggregation, spacing=spacing)
    order = [f"{entry.name}@{axis}" for entry in evidence.layout.parameters for axis in summed_axes(len(entry.shape))]
    return CriterionResult(
        {name: importance[name] for name in evidence.prunable},
        {key: axes[key] for key in order},
        gradient_evaluations=len(samples),
    )


def _taylor(evidence: Evidence) -> CriterionResult:
    return first_order(evidence, evidence.options.get("target", "loss"), evidence.options.get("aggregation", "mean"))


CRITERION = Criterion(
    _taylor,
    "first-order change of the mean loss (arXiv 1906.10771)",
    needs_data=True,
    spreads=True,
    group="sum",
    aggregation="mean",
    accepts=("target", "aggregation"),
)
