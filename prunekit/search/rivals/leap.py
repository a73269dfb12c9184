"""LEAP: a Gumbel-sigmoid gate a weight, learnt end to end (Mozaffari et al. 2026, arXiv 2605.17289).

A weight's gate is ``σ((κ l + n) / τ)``, l its logit, n the difference of two Gumbel variables drawn anew in every step; τ falls
from 4 to 0.05 and κ rises from 25 to 350. What is lowered is the divergence from the dense model (the paper: the loss), plus
``7 |mean gate - density|``, less ``10 (1 - t) Σ_layers ‖gates ∘ W‖ / Σ_layers ‖W‖`` with t from 0 to 1 over the steps, which
keeps gradients from vanishing. Logits start at ``N(0, 0.014)`` with three standard deviations added where the given mask keeps a
weight and taken off where it does not. Adam's rate falls to 0 in a straight line. At the end the weights of the largest logits
stay, as many as the plan keeps, or as its pattern has them. Constants are those of the authors' repository.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunekit.plan import Plan
from prunekit.repair.stream import Stream
from prunekit.repair.swaps import get_swaps
from prunekit.search.rivals.soft_masks import SoftMasks
from prunekit.task import Task
from prunekit.trajectory import Layout

TEMPERATURE, SCALE = (4.0, 0.05), (25.0, 350.0)
SPREAD, PRIOR = 0.014, 3.0
DENSITY, SIZE = 7.0, 10.0
RATE = 1e-3


def leap_mask(
    plan: Plan, model: nn.Module, stream: Stream, task: Task, *, steps: int, rate: float = RATE, seed: int = 0
) -> dict[str, Tensor]:
    """What stays, as ``Plan.keep``; 20 bytes a weight beside the model and its copy: logits, Adam's two, gates, gradients."""
    soft = SoftMasks(model, list(plan.keep), stream, task)
    gates = Gates(plan, soft, seed)
    optimizer = torch.optim.Adam(gates.logits.values(), lr=rate)
    soft.learn(gates, optimizer, lambda t: rate * (1 - t), steps, "leap")
    swaps = get_swaps(plan, Layout.of(model), soft.device)
    kept = swaps.select(torch.cat([gates.logits[name].flatten() for name in plan.keep]))
    return swaps.plan(kept).keep


class Gates:
    """Logits of the weights, and their gates of this step."""

    def __init__(self, plan: Plan, soft: SoftMasks, seed: int) -> None:
        self._soft, self._generator = soft, torch.Generator(device=soft.device).manual_seed(seed)
        self.logits: dict[str, Tensor] = {}
        for name, keep in plan.keep.items():
            drawn = torch.empty(keep.shape, device=soft.device).normal_(0, SPREAD, generator=self._generator)
            self.logits[name] = drawn + PRIOR * SPREAD * (2 * keep.to(soft.device).to(drawn) - 1)
        self._total = sum(keep.numel() for keep in plan.keep.values())
        self._density = sum(int(keep.sum()) for keep in plan.keep.values()) / self._total
        self._whole = torch.stack([soft.dense(name).norm() for name in plan.keep]).sum()
        self._gates: dict[str, Tensor] = {}
        self._steep = self._size = 0.0
        self._sparse = torch.zeros(())

    def draw(self, t: float) -> Mapping[str, Tensor]:
        temperature, scale = (first + t * (last - first) for first, last in (TEMPERATURE, SCALE))
        self._steep, self._size = scale / temperature, SIZE * (1 - t)
        self._gates = {
            name: (scale * each + self._noise(each)).div_(temperature).sigmoid_() for name, each in self.logits.items()
        }
        mean = torch.stack([gate.sum() for gate in self._gates.values()]).sum() / self._total
        self._sparse = DENSITY * (mean - self._density).sign() / self._total
        return self._gates

    def use(self, name: str, slope: Tensor) -> None:
        gate, weight = self._gates[name], self._soft.dense(name)
        size = (gate * weight).norm().clamp_min(1e-30) * self._whole
        slope += self._sparse - gate * weight.square() * (self._size / size)
        self.logits[name].grad = slope.mul_(gate).mul_(1 - gate).mul_(self._steep)

    def _noise(self, like: Tensor) -> Tensor:
        """The difference of two Gumbel variables, of a tensor's shape."""
        uniform = torch.rand(like.shape, generator=self._generator, device=like.device).clamp_(1e-6, 1 - 1e-6)
        return torch.logit(uniform)
