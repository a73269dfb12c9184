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

from prunekit.batch import Inputs, Labels, call
from prunekit.data import Samples
from prunekit.kernel import ModelFunction
from prunekit.kernel.gradients import MomentEngine, choose_engine
from prunekit.task import Task
from prunekit.task.referenced import KeptBatches, Referenced

POWER = 0.75  # of the preconditioner (Martens 2010, section 4.7)
STEPS = (1.0, 0.5, 0.25, 0.125)
RELAX = 4.0  # damping falls by this factor after a round that helped, and rises by it after one that did not


@dataclass(frozen=True)
class Distance:
    """``J(θ)``: the task's divergence of the model's outputs from the dense model's, in the mean over samples.

    ``KL(dense ‖ model)`` where outputs are scores of classes, else the squared difference (``Task.divergence``).

    Attributes:
        outputs: the model's outputs, every sample's in one row.
        task: what the outputs mean.
        dense: gives the outputs to stay close to, and their shape.
    """

    outputs: ModelFunction
    task: Task
    dense: nn.Module

    def referenced(self, samples: Samples) -> Referenced:
        """Samples beside the dense model's outputs for them."""

        def reference(x: Inputs, y: Labels) -> Tensor:
            return self.task.reference(self.task.outputs(call(self.dense, x)))

        return Referenced(KeptBatches(samples, self.outputs.device), reference)

    def _shaped(self, rows: Tensor, labels: Labels) -> Tensor:
        """Outputs as the task knows them, of the shape of the dense model's."""
        return rows.view(len(rows), *labels[0].shape[1:])

    def divergences(self, rows: Tensor, labels: Labels) -> Tensor:
        """``(samples, 1)`` from outputs in rows."""
        return self.task.divergence(self._shaped(rows, labels), labels)

    @torch.no_grad()
    def value(self, theta: Tensor, batches: Referenced) -> float:
        """``J(θ)`` on samples; 0 for one that rounding alone can make."""
        total = sum(float(self.divergences(self.outputs(theta, x, y), y).sum()) for x, y in batches)
        mean = total / batches.samples
        return 0.0 if mean <= torch.finfo(theta.dtype).eps else mean

    def gradient(self, theta: Tensor, batches: Referenced) -> Tensor:
        """``∂J/∂θ``, ``(P,)``."""
        total = torch.zeros_like(theta)
        along = self.outputs.narrowed(slice(None))
        along.target = lambda out, labels: self.task.divergence(out, labels)
        for x, y in batches:
            total += along.gradient(theta, x, y)[1]
        return total / batches.samples

    def product(self, theta: Tensor, direction: Tensor, batches: Referenced) -> Tensor:
        """``Jᵀ H J v`` in the mean over samples, ``(P,)``: the Gauss-Newton matrix times ``direction``."""
        total = torch.zeros_like(theta)
        for x, y in batches:
            found, moved = self.outputs.directional(theta, direction, x, y)
            curved = self.task.curved(self._shaped(found, y), y, self._shaped(moved, y))
            total += self.outputs.gradient(theta, x, y, curved.reshape(found.shape))[1]
        return total / batches.samples

    def diagonal(self, theta: Tensor, batches: Referenced, engine: MomentEngine, generator: torch.Generator) -> Tensor:
        """An unbiased estimate of that matrix's diagonal, one draw a sample, ``(P,)``: ``E[(Jᵀu)²]`` with ``E[u uᵀ] = H``."""
        total = torch.zeros_like(theta)
        parts = self.outputs.layout.views(total)
        for x, y in batches:
            with torch.no_grad():
                found = self.outputs(theta, x, y)
                drawn = self.task.drawn(self._shaped(found, y), y, generator).reshape(found.shape)
            for name, squares in engine.squares(theta, x, drawn).items():
                parts[name].add_(squares)
        return total / batches.samples

    def engine(self, theta: Tensor, batches: Referenced) -> MomentEngine:
        """Gives the squares of per-sample gradients that ``diagonal`` adds up."""
        along = self.outputs.narrowed(slice(None))
        along.target = lambda out, drawn: (out.reshape(drawn.shape) * drawn).sum(1, keepdim=True)
        x, y = batches.few()
        return choose_engine(along, theta, x, self.outputs(theta, x, y).detach())


def descend(
    distance: Distance,
    theta: Tensor,
    free: Tensor,
    learn: Referenced,
    accept: Referenced,
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
    generator = torch.Generator().manual_seed(seed)
    engine = distance.engine(theta, learn)
    reached = distance.value(theta, accept)
    for _ in range(rounds):
        gradient = distance.gradient(theta, learn) * free
        diagonal = distance.diagonal(theta, learn, engine, generator)
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
    learn: Referenced,
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
