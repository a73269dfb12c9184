"""Least squares on a network's outputs: Gauss-Newton steps of its kept weights towards the dense model's outputs.

The quadratic model of the distance is never formed: conjugate gradients need its products with vectors alone, and each is one
derivative forward and one backward (Schraudolph 2002; Martens 2010, "Deep learning via Hessian-free optimization").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.kernel import ModelFunction, divergence
from prunekit.kernel.gradients import MomentEngine, choose_engine

Referred = Sequence[tuple[Tensor, Tensor]]
"""Batches of inputs and the dense model's outputs for them."""

POWER = 0.75  # of the preconditioner (Martens 2010, section 4.7)
STEPS = (1.0, 0.5, 0.25, 0.125)
RELAX = 4.0  # damping falls by this factor after a round that helped, and rises by it after one that did not


@dataclass(frozen=True)
class Distance:
    """``J(θ)``: how far the model's outputs are from the dense model's, in the mean over samples and positions.

    Attributes:
        outputs: the model's outputs as they come.
        classes: whether the last axis holds scores of classes. Then J is ``KL(softmax(dense) ‖ softmax(model))``, else half the
            mean squared difference.
    """

    outputs: ModelFunction
    classes: bool

    def of(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The sum over samples of their distances, from outputs."""
        if not self.classes:
            return 0.5 * (found - wanted).square().flatten(1).mean(1).sum()
        return divergence(found, F.log_softmax(wanted, -1)).sum()

    @torch.no_grad()
    def value(self, theta: Tensor, batches: Referred) -> float:
        """``J(θ)`` on samples; 0 for a divergence that rounding alone can make."""
        total = sum(float(self.of(self.outputs(theta, x, wanted), wanted)) for x, wanted in batches)
        mean = total / sum(len(x) for x, _ in batches)
        return 0.0 if self.classes and mean <= torch.finfo(theta.dtype).eps else mean

    def gradient(self, theta: Tensor, batches: Referred) -> Tensor:
        """``∂J/∂θ``, ``(P,)``."""
        total = torch.zeros_like(theta)
        for x, wanted in batches:
            at = theta.clone().requires_grad_()
            total += torch.autograd.grad(self.of(self.outputs(at, x, wanted), wanted), at)[0]
        return total / sum(len(x) for x, _ in batches)

    def curved(self, found: Tensor, direction: Tensor) -> Tensor:
        """``H u``, ``H`` the second derivative of a sample's distance in the model's outputs ``found``."""
        if not self.classes:
            return direction / direction[0].numel()
        p = F.softmax(found, -1)
        curved: Tensor = p * (direction - (p * direction).sum(-1, keepdim=True))
        return curved / found[0, ..., 0].numel()

    def drawn(self, found: Tensor, generator: torch.Generator) -> Tensor:
        """A random ``u`` of the outputs' shape with ``E[u uᵀ] = H``: Jᵀu squared is the diagonal of the curvature in the mean."""
        if not self.classes:
            signs = torch.randint(2, found.shape, generator=generator).to(found) * 2 - 1
            return signs / math.sqrt(found[0].numel())
        p = F.softmax(found, -1)
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).view(p.shape[:-1]).to(p.device)
        return (F.one_hot(labels, p.shape[-1]) - p) / math.sqrt(found[0, ..., 0].numel())

    def product(self, theta: Tensor, direction: Tensor, batches: Referred) -> Tensor:
        """``Jᵀ H J v`` in the mean over samples, ``(P,)``: the Gauss-Newton matrix times ``direction``."""
        total = torch.zeros_like(theta)
        for x, wanted in batches:
            _, moved = self.outputs.directional(theta, direction, x, wanted)
            at = theta.clone().requires_grad_()
            found = self.outputs(at, x, wanted)
            total += torch.autograd.grad(found, at, self.curved(found.detach(), moved))[0]
        return total / sum(len(x) for x, _ in batches)

    def diagonal(self, theta: Tensor, batches: Referred, engine: MomentEngine, generator: torch.Generator) -> Tensor:
        """An unbiased estimate of that matrix's diagonal, one draw a sample, ``(P,)``."""
        total = torch.zeros_like(theta)
        parts = self.outputs.layout.views(total)
        for x, wanted in batches:
            with torch.no_grad():
                drawn = self.drawn(self.outputs(theta, x, wanted), generator)
            for name, squares in engine.squares(theta, x, drawn).items():
                parts[name].add_(squares)
        return total / sum(len(x) for x, _ in batches)

    def engine(self, theta: Tensor, batches: Referred) -> MomentEngine:
        """Gives the squares of per-sample gradients that ``diagonal`` adds up."""
        along = self.outputs.narrowed(slice(None))
        along.target = lambda out, drawn: (out * drawn).flatten(1).sum(1, keepdim=True)
        return choose_engine(along, theta, *batches[0])


def descend(
    distance: Distance,
    theta: Tensor,
    free: Tensor,
    learn: Referred,
    accept: Referred,
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
    learn: Referred,
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
