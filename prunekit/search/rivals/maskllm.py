"""MaskLLM: which of the patterns of N:M every run of M weights has, learnt end to end (Fang et al. 2024, arXiv 2409.17481).

A run has a logit for each of its ``C(M, N)`` patterns. The model runs with their mean, weighed by ``softmax((κ l + g) / τ)``, g
Gumbel variables drawn anew in every step; τ falls from 4 to 0.05, κ rises from 100 to 500. What is lowered is the divergence
from the dense model (the paper: the loss) less ``1e-5 Σ ‖mask ∘ W‖²``, which keeps gradients from vanishing. Logits start at
``N(0, 0.01)``, plus three standard deviations times how many weights more than on average a pattern shares with the given mask.
AdamW with betas 0.9 and 0.95, weight decay 0.1 and gradients clipped at a norm of 1; its rate falls to a tenth along a cosine. At
the end the pattern of the largest logit stays. What a row has beyond its last whole run keeps the given mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError
from prunekit.plan import Plan
from prunekit.repair.stream import Stream
from prunekit.search.rivals.soft_masks import SoftMasks
from prunekit.structure import pattern_of
from prunekit.task import Task

TEMPERATURE, SCALE = (4.0, 0.05), (100.0, 500.0)
SPREAD, PRIOR = 0.01, 3.0
SIZE = 1e-5
RATE, LEAST = 5e-4, 0.1
MOST = 256
"""Patterns of a run; every one costs a logit, two of Adam's numbers, a gradient and a probability."""


def maskllm_mask(
    plan: Plan, model: nn.Module, stream: Stream, task: Task, *, steps: int, rate: float = RATE, seed: int = 0
) -> dict[str, Tensor]:
    """What stays, as ``Plan.keep``; ``20 C(M, N) / M + 4`` bytes a weight beside the model and its copy: 34 for 2:4, 179 for 4:8.

    Raises:
        UsageError: the plan is of no N:M pattern, or of one with more than ``MOST`` choices.
    """
    patterns = patterns_of(plan.structure)
    soft = SoftMasks(model, list(plan.keep), stream, task)
    choice = Choice(plan, soft, patterns.to(soft.device), seed)
    optimizer = torch.optim.AdamW(choice.logits.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    soft.learn(choice, optimizer, lambda t: rate * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * t)) / 2), steps, "maskllm", 1.0)
    return choice.keep()


def patterns_of(structure: str) -> Tensor:
    """Every choice of N among M, ``(C(M, N), M)`` of 0 and 1.

    Raises:
        UsageError: it is no N:M pattern, or one with more than ``MOST`` choices.
    """
    pattern = pattern_of(structure)
    if pattern is None or pattern.kind != "nm":
        raise UsageError(f"maskllm chooses patterns of N:M, and the plan's structure is {structure}; take leap for it")
    stay, of = pattern.first, pattern.second
    choices = math.comb(of, stay)
    if choices > MOST:
        raise UsageError(f"maskllm: {structure} has {choices:,} patterns a run, more than {MOST}; take leap, or 2:4 or 4:8")
    found = torch.zeros(choices, of)
    for row, chosen in zip(found, combinations(range(of), stay), strict=True):
        row[list(chosen)] = 1
    return found


class Choice:
    """Logits ``(runs, choices)`` of the weights, and the choices' probabilities of this step."""

    def __init__(self, plan: Plan, soft: SoftMasks, patterns: Tensor, seed: int) -> None:
        self._soft, self._patterns = soft, patterns
        self._generator = torch.Generator(device=soft.device).manual_seed(seed)
        self._runs = {name: Runs(keep, plan.outputs(name), patterns) for name, keep in plan.keep.items()}
        self.logits: dict[str, Tensor] = {}
        for name, runs in self._runs.items():
            shared = runs.given() @ patterns.t()
            drawn = torch.empty_like(shared).normal_(0, SPREAD, generator=self._generator)
            self.logits[name] = drawn + PRIOR * SPREAD * (shared - shared.mean(1, keepdim=True))
        self._shares: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._steep = 0.0

    def draw(self, t: float) -> Mapping[str, Tensor]:
        temperature, scale = (first + t * (last - first) for first, last in (TEMPERATURE, SCALE))
        self._steep = scale / temperature
        for name, each in self.logits.items():
            self._shares[name] = (scale * each + self._gumbel(each)).div_(temperature).softmax(1)
            self._masks[name] = self._runs[name].mask(self._shares[name] @ self._patterns)
        return self._masks

    def use(self, name: str, slope: Tensor) -> None:
        slope -= 2 * SIZE * self._masks[name] * self._soft.dense(name).square()
        share, by_pattern = self._shares[name], self._runs[name].split(slope) @ self._patterns.t()
        self.logits[name].grad = share * (by_pattern - (share * by_pattern).sum(1, keepdim=True)) * self._steep

    def keep(self) -> dict[str, Tensor]:
        """The patterns of the largest logits."""
        return {name: self._runs[name].mask(self._patterns[each.argmax(1)]).bool().cpu() for name, each in self.logits.items()}

    def _gumbel(self, like: Tensor) -> Tensor:
        uniform = torch.rand(like.shape, generator=self._generator, device=like.device).clamp_(1e-10, 1 - 1e-7)
        return -(-uniform.log()).log()


class Runs:
    """The runs of M of one weight, along an output's own weights.

    Args:
        keep: the given mask, of the weight's shape.
        axis: of the weight's outputs.
        patterns: ``(choices, M)``.
    """

    def __init__(self, keep: Tensor, axis: int, patterns: Tensor) -> None:
        self._axis, self._size = axis, patterns.shape[1]
        moved = keep.to(patterns.device).movedim(axis, 0)
        self._shape, self._rows = moved.shape, moved.flatten(1)
        self._full = self._rows.shape[1] // self._size * self._size
        self._kind = patterns.dtype

    def given(self) -> Tensor:
        """The given mask, ``(runs, M)`` of 0 and 1."""
        return self._rows[:, : self._full].reshape(-1, self._size).to(self._kind)

    def split(self, values: Tensor) -> Tensor:
        """Of the weight's shape -> ``(runs, M)``."""
        return values.movedim(self._axis, 0).flatten(1)[:, : self._full].reshape(-1, self._size)

    def mask(self, runs: Tensor) -> Tensor:
        """``(runs, M)`` -> of the weight's shape; what lies beyond the last whole run as it was given."""
        rows = runs.reshape(len(self._rows), self._full)
        if self._full < self._rows.shape[1]:
            rows = torch.cat([rows, self._rows[:, self._full :].to(rows)], 1)
        return rows.view(self._shape).movedim(0, self._axis)
