"""Gradient: ``|∂L/∂θ|`` of the mean loss over the scoring samples, at the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Labels
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence, Spread


def mean_loss_gradient(evidence: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Gradient of the mean loss over all scoring samples, parameter by parameter."""
    if evidence.spread is not None:
        yield from _by_parts(evidence, evidence.spread)
        return
    function, batches = evidence.batch_losses()
    theta = evidence.state.to(function.device)
    total = torch.zeros(theta.shape, dtype=torch.float64)
    for (x, y), share in batches:
        total += function.gradient(theta, x, y, theta.new_full((), share))[1].cpu()
    ranks.add_up([total])
    yield from evidence.layout.views(total.to(theta.dtype)).items()


def _by_parts(evidence: Evidence, spread: Spread) -> Iterator[tuple[str, Tensor]]:
    """The same; sums of one part of the model are held at a time."""
    loss, dtype = evidence.task.loss, evidence.state.dtype
    samples = evidence.samples() if loss.weights is None else spread.cut(evidence.samples())  # a loss may mix its batch
    counts = [loss.counted(labels, len(group)) for (_, labels), group in zip(samples, samples.groups, strict=True)]
    total = sum(counts)
    shares = [count / max(total, 1e-30) for count in counts]

    def part(outputs: Tensor, labels: Labels, number: int) -> Tensor:
        if not counts[number] and total:  # the mean over a part of which nothing counts is no number
            return outputs.sum() * 0
        return loss.batch(outputs, labels) * shares[number]

    for _, each in groupby(spread.backward(samples, part), key=lambda one: one[0]):
        sums: dict[str, Tensor] = {}
        for _, _, gradients in each:
            for name, gradient in gradients.items():
                sums[name] = sums[name].add_(gradient) if name in sums else gradient.double()
        yield from ((name, found.to(dtype).cpu()) for name, found in sums.items())


def from_gradient(evidence: Evidence, importance: Callable[[str, Tensor], Tensor]) -> CriterionResult:
    """Importance of a weight by its name and the mean loss's gradient."""
    found = {name: importance(name, gradient) for name, gradient in mean_loss_gradient(evidence) if name in evidence.prunable}
    return CriterionResult({name: found[name] for name in evidence.prunable}, gradient_evaluations=len(evidence.samples()))


def _gradient(evidence: Evidence) -> CriterionResult:
    return from_gradient(evidence, lambda name, gradient: gradient.abs())


CRITERION = Criterion(_gradient, "absolute gradient of the mean loss", needs_data=True, spreads=True)
