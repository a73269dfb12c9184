"""Least squares on a network's outputs: Gauss-Newton steps of its kept weights towards the dense model's outputs.

The quadratic model of the distance is never formed: conjugate gradients need its products with vectors alone, and each is one
derivative forward and one backward (Schraudolph 2002; Martens 2010, "Deep learning via Hessian-free optimization").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Inputs, Labels, call, fresh, take
from prunekit.data import Samples
from prunekit.data.sharing import sharing
from prunekit.kernel import ModelFunction
from prunekit.kernel.gradients import MomentEngine, choose_engine
from prunekit.task import Task
from prunekit.task.referenced import KeptBatches, Referenced

SEEDS = 1_000_003  # apart are the seeds of neighbouring rounds; a sample's lie between
POWER = 0.75  # of the preconditioner (Martens 2010, section 4.7)
STEPS = (1.0, 0.5, 0.25, 0.125)
RELAX = 4.0  # damping falls by this factor after a round that helped, and rises by it after one that did not


def _mean(total: Tensor, part: Part) -> Tensor:
    ranks.add_up([total])
    return total / part.samples


@dataclass(frozen=True)
class Part:
    """A rank's own of ``samples`` samples, which begin at ``begin`` of all."""

    batches: Referenced
    begin: int
    samples: int


@dataclass(frozen=True)
class Distance:
    """``J(θ)``: the task's divergence of the model's outputs from the dense model's, in the mean over the samples of all ranks.

    ``KL(dense ‖ model)`` where outputs are scores of classes, else the squared difference (``Task.divergence``).

    Attributes:
        outputs: the model's outputs, every sample's in one row.
        task: what the outputs mean.
        dense: gives the outputs to stay close to, and their shape.
    """

    outputs: ModelFunction
    task: Task
    dense: nn.Module

    def referenced(self, samples: Samples) -> Part:
        """Samples beside the dense model's outputs for them; at least as many as there are ranks."""

        def reference(x: Inputs, y: Labels) -> Tensor:
            return self.task.reference(self.task.outputs(call(self.dense, fresh(x))))

        with sharing(samples) as (own, begin):
            return Part(Referenced(KeptBatches(own, self.outputs.device), reference), begin, len(samples))

    def _shaped(self, rows: Tensor, labels: Labels) -> Tensor:
        """Outputs as the task knows them, of the shape of the dense model's."""
        return rows.view(len(rows), *labels[0].shape[1:])

    def divergences(self, rows: Tensor, labels: Labels) -> Tensor:
        """``(samples, 1)`` from outputs in rows."""
        return self.task.divergence(self._shaped(rows, labels), labels)

    @torch.no_grad()
    def value(self, theta: Tensor, part: Part) -> float:
        """``J(θ)`` on samples; 0 for one that rounding alone can make."""
        total = torch.zeros(1, dtype=torch.float64)
        for x, y in part.batches:
            total += float(self.divergences(self.outputs(theta, x, y), y).sum())
        ranks.add_up([total])
        mean = float(total) / part.samples
        return 0.0 if mean <= torch.finfo(theta.dtype).eps else mean

    def gradient(self, theta: Tensor, part: Part) -> Tensor:
        """``∂J/∂θ``, ``(P,)``."""
        total = torch.zeros_like(theta)
        along = self.outputs.narrowed(slice(None))
        along.target = lambda out, labels: self.task.divergence(out, labels)
        for x, y in part.batches:
            total += along.gradient(theta, x, y)[1]
        return _mean(total, part)

    def product(self, theta: Tensor, direction: Tensor, part: Part) -> Tensor:
        """``Jᵀ H J v`` in the mean over samples, ``(P,)``: the Gauss-Newton matrix times ``direction``."""
        total = torch.zeros_like(theta)
        for x, y in part.batches:
            found, moved = self.outputs.directional(theta, direction, x, y)
            curved = self.task.curved(self._shaped(found, y), y, self._shaped(moved, y))
            total += self.outputs.gradient(theta, x, y, curved.reshape(found.shape))[1]
        return _mean(total, part)

    def diagonal(self, theta: Tensor, part: Part, engine: MomentEngine, seed: int) -> Tensor:
        """An unbiased estimate of that matrix's diagonal, one draw a sample, ``(P,)``: ``E[(Jᵀu)²]`` with ``E[u uᵀ] = H``.

        What is drawn for a sample depends on ``seed`` and on which of all samples it is.
        """
        total = torch.zeros_like(theta)
        views, number = self.outputs.layout.views(total), part.begin
        for x, y in part.batches:
            with torch.no_grad():
                found = self.outputs(theta, x, y)
                drawn = self._drawn(self._shaped(found, y), y, seed, number).reshape(found.shape)
            number += len(found)
            for name, squares in engine.squares(theta, x, drawn).items():
                views[name].add_(squares)
        return _mean(total, part)

    def _drawn(self, outputs: Tensor, labels: Labels, seed: int, begin: int) -> Tensor:
        """``Task.drawn`` of each sample by itself; the first is number ``begin``."""
        generator, found = torch.Generator(), []
        for k in range(len(outputs)):
            generator.manual_seed((seed * SEEDS + begin + k) % 2**63)
            one = slice(k, k + 1)
            found.append(self.task.drawn(outputs[one], take(labels, one, len(outputs)), generator))
        return torch.cat(found)

    def engine(self, theta: Tensor, part: Part) -> MomentEngine:
        """Gives the squares of per-sample gradients that ``diagonal`` adds up."""
        along = self.outputs.narrowed(slice(None))
        along.target = lambda out, drawn: (out.reshape(drawn.shape) * drawn).sum(1, keepdim=True)
        x, y = part.batches.few()
        return choose_engine(along, theta, x, self.outputs(theta, x, y).detach())


def descend(
    distance: Distance,
    theta: Tensor,
    free: Tensor,
    learn: Part,
    accept: Part,
    *,
    rounds: int,
    steps: int,
    damping: float,
    seed: int,
) -> Iterator[tuple[Tensor, float]]:
    """After every round the best weights so far and their ``J`` on ``accept``, which never rises.

    A round minimises ``J(θ) + g·d + d·(G + λ)d / 2`` over what is free, approximately, and goes along ``d`` as far as helps most
    on samples that the least squares has not seen; not at all, if nothing there helps.

    Args:
        theta: where to start, ``(P,)``.
        free: 1 where a coordinate may move, 0 where it stays, ``(P,)``.
        steps: of conjugate gradients a round.
        damping: λ over the mean diagonal of ``G``; adapted from round to round.
    """
    engine = distance.engine(theta, learn)
    reached = distance.value(theta, accept)
    for number in range(rounds):
        gradient = distance.gradient(theta, learn) * free
        diagonal = distance.diagonal(theta, learn, engine, seed * SEEDS + number)
        level = damping * float((diagonal * free).sum() / free.sum().clamp_min(1))
        change = _solved(distance, theta, free, learn, gradient, diagonal, level, steps)
        tried = [(distance.value(theta + step * change, accept), step) for step in STEPS]
        value, step = min(((value, step) for value, step in tried if not math.isnan(value)), default=(math.inf, 0.0))
        if value < reached:
            theta, reached, damping = theta + step * change, value, damping / RELAX
        else:
            damping *= RELAX
        yield theta, reached


def _solved(
    distance: Distance,
    theta: Tensor,
    free: Tensor,
    learn: Part,
    gradient: Tensor,
    diagonal: Tensor,
    level: float,
    steps: int,
) -> Tensor:
    """``d`` with ``(G + level) d ≈ -gradient``, 0 where not free: preconditioned conjugate gradients from 0."""
    scale = (diagonal + level).clamp_min(torch.finfo(theta.dtype).tiny) ** -POWER * free
    change, residual = torch.zeros_like(theta), -gradient
    direction = scale * residual
    size = float(residual @ direction)
    for _ in range(steps):
        curved = (distance.product(theta, direction, learn) + level * direction) * free
        bend = float(direction @ curved)
        if not (size > 0 and bend > 0):  # solved, or nothing that rounding leaves
            break
        change = change + size / bend * direction
        residual = residual - size / bend * curved
        previous, size = size, float(residual @ (scale * residual))
        direction = scale * residual + size / previous * direction
    return change
