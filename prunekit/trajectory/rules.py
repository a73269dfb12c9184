"""How an optimizer turns gradients and weights into steps: one small class per optimizer, linear in the gradient.

Given its learning rates and second moments, every optimizer here is a linear recursion per weight,

    b_s      = carry b_{s-1} + gain (g_s + λ θ_s)
    θ_{s+1}  = θ_s - rate (direct (g_s + λ θ_s) + through b_s) - decoupled θ_s

so one description (``LinearStep``) yields what weight decay did (``R_s``), what survives of an early move, and what a
training sample's gradient did (docs/kernel.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prunekit.trajectory.layout import Layout


@dataclass(frozen=True)
class StepLog:
    """One optimizer step.

    Attributes:
        groups: each parameter group's hyperparameters as they were used.
        batches: sample indices of each micro-batch, or None when they were not recorded.
        weights: factor on each micro-batch's mean loss in the step's gradient.
        seeds: of each micro-batch's augmentation; None where there was none.
        gradient_scale: factor that clipping put on the gradient.
        without_gradient: names of parameters whose gradient was None, which the step left alone.
        moved: False for a state that was set, not stepped to (weights pruned, or averaged at the end).
    """

    groups: tuple[Mapping[str, Any], ...] = ()
    batches: tuple[tuple[int, ...], ...] | None = None
    weights: tuple[float, ...] = ()
    seeds: tuple[int | None, ...] = ()
    gradient_scale: float = 1.0
    without_gradient: frozenset[str] = frozenset()
    moved: bool = True


@dataclass(frozen=True)
class LinearStep:
    """One parameter's step, see the equations above; ``rate`` may be a flat tensor of the parameter's size."""

    rate: float | Tensor
    direct: float = 0.0
    through: float = 0.0
    gain: float = 0.0
    carry: float = 0.0
    coupled: float = 0.0
    decoupled: float = 0.0


class OptimizerRule:
    """What a rule says of one parameter's step. To add an optimizer, write ``step`` and put the class into ``RULES``."""

    second_moments = False
    """Whether ``step`` needs the recorded second moments (``Recorder(..., second_moments=True)``)."""

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        """The linear form of one step.

        Args:
            options: the parameter group's hyperparameters at this step.
            count: how many steps this parameter has taken, this one included.
            second_moment: raw ``v`` after this step, flat, for rules that need it.
        """
        raise NotImplementedError


class SGD(OptimizerRule):
    """torch's SGD: momentum μ, dampening (not at the first step, which fills the buffer), Nesterov, coupled decay λ."""

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        rate, decay, momentum = options["lr"], options["weight_decay"], options["momentum"]
        if momentum == 0:
            return LinearStep(rate, direct=1.0, coupled=decay)
        gain = 1.0 if count == 1 else 1 - options["dampening"]
        if options["nesterov"]:
            return LinearStep(rate, direct=1.0, through=momentum, gain=gain, carry=momentum, coupled=decay)
        return LinearStep(rate, through=1.0, gain=gain, carry=momentum, coupled=decay)


class DecoupledDecay(OptimizerRule):
    """AdamW's decay share (Loshchilov & Hutter 2019), ``R_s = -a_s λ θ_s``, which needs no second moments."""

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        return LinearStep(0.0, decoupled=options["lr"] * options["weight_decay"])


class Adam(OptimizerRule):
    """Adam and AdamW, amsgrad too: ``rate = a / ((1 - β1^t) (sqrt(v / (1 - β2^t)) + ε))`` per weight.

    For amsgrad the recorded ``v`` is the running maximum of the raw second moments, as torch divides by it.
    """

    second_moments = True

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        assert second_moment is not None
        first, second = options["betas"]
        spread = (second_moment / (1 - second**count)).sqrt_().add_(options["eps"])
        rate = options["lr"] / ((1 - first**count) * spread)
        decay = options["weight_decay"]
        if options.get("decoupled_weight_decay"):
            return LinearStep(rate, through=1.0, gain=1 - first, carry=first, decoupled=options["lr"] * decay)
        return LinearStep(rate, through=1.0, gain=1 - first, carry=first, coupled=decay)


class NoDecay(OptimizerRule):
    """Adam without weight decay and without recorded second moments: the update is all the data's."""

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        return LinearStep(0.0)


RULES: dict[str, type[OptimizerRule]] = {"torch.SGD": SGD, "torch.Adam": Adam, "torch.AdamW": Adam}
"""By ``optimizer_name``; a user's own optimizer goes in as ``RULES["my_module.MyOptimizer"] = MyRule``."""


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """``torch.AdamW`` for torch's own classes, the import path for anything else (a subclass may differ)."""
    cls = type(optimizer)
    own = cls.__module__.startswith("torch.optim.")
    return f"torch.{cls.__name__}" if own else f"{cls.__module__}.{cls.__qualname__}"


class Recursion:
    """The recursion of one recorded path: which linear step each parameter took at each optimizer step.

    Attributes:
        note: a sentence on what cannot be told apart; empty when everything can.
        explains_data: whether training samples' gradients can be traced (data-wise scores).
        taken: by step, how many were taken up to it and with it (states that were set are none).
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: Mapping[str, Any] | None,
        log: Sequence[StepLog],
        has_second_moments: bool,
        start_counts: Mapping[str, int],
    ) -> None:
        self.log = log
        self.spans = {entry.name: entry.span for entry in layout}
        self.members = [group["parameters"] for group in optimizer["groups"]] if optimizer else []
        self.rule, self.note, self.explains_data = _rule_for(optimizer, has_second_moments)
        self._counts = dict(start_counts)
        self.taken = list(accumulate(int(step.moved) for step in log))
        self._even = all(not step.without_gradient for step in log)

    def step(self, index: int, second_moments: Tensor | None) -> Iterator[tuple[str, LinearStep]]:
        """``(name, linear step)`` of every parameter that moved at step ``index``."""
        step = self.log[index]
        if self.rule is None or not step.moved:
            return
        for members, options in zip(self.members, step.groups, strict=True):
            for name in members:
                if name in step.without_gradient or name not in self.spans:
                    continue
                v = None if second_moments is None else second_moments[self.spans[name]]
                yield name, self.rule.step(options, self._count(name, index), v)

    def _count(self, name: str, index: int) -> int:
        before = self._counts.get(name, 0)
        if self._even:
            return before + self.taken[index]
        return before + sum(1 for s in self.log[: index + 1] if s.moved and name not in s.without_gradient)

    def regularisation(self, index: int, state: Tensor, v: Tensor | None, running: Tensor, out: Tensor) -> None:
        """Adds ``R_s`` to ``out`` and moves decay's own buffer ``running`` on; all flat ``(P,)``."""
        for name, linear in self.step(index, v):
            span = self.spans[name]
            theta, buffer = state[span], running[span]
            if linear.decoupled:
                out[span].add_(theta, alpha=-linear.decoupled)
            if linear.coupled:
                buffer.mul_(linear.carry).add_(theta, alpha=linear.gain * linear.coupled)
                pull = linear.direct * linear.coupled * theta + linear.through * buffer
                out[span].sub_(pull * linear.rate)


def _rule_for(optimizer: Mapping[str, Any] | None, has_second_moments: bool) -> tuple[OptimizerRule | None, str, bool]:
    if optimizer is None:
        return None, "the optimizer is not known: the whole update counts as the data's share, weight decay included", False
    rule = RULES.get(optimizer["name"])
    if rule is None:
        return None, (
            f"no rule for {optimizer['name']}: the whole update counts as the data's share, weight decay included, and "
            "data-wise scores cannot be had (prunekit.trajectory.rules.OptimizerRule says how to add one)"
        ), False  # fmt: skip
    if not rule.second_moments or has_second_moments:
        return rule(), "", True
    groups = optimizer["groups"]
    if rule is not Adam:
        return None, f"{optimizer['name']} needs Recorder(..., second_moments=True) to tell decay from data", False
    if all(g.get("decoupled_weight_decay") for g in groups):
        return DecoupledDecay(), "", False
    if all(g["weight_decay"] == 0 for g in groups):
        return NoDecay(), "", False
    return None, (
        "Adam's coupled weight decay passes through its second moments, which were not recorded (second_moments=True "
        "does): the whole update counts as the data's share"
    ), False  # fmt: skip


def survival(
    recursion: Recursion, second_moments: Callable[[int], Tensor | None]
) -> tuple[list[dict[str, float | Tensor]], dict[str, float | Tensor]]:
    """What is left at the end of a unit that a step's data update put into a weight, decay acting on it since.

    Backwards from ``(p, q) = (1, 0)`` for a weight and its decay buffer; numbers, except under Adam's coupled decay,
    where they differ by weight.

    Returns:
        for every step, ``name -> ω_s`` (absent: 1), and ``name -> Π``, the same for the starting weights.
    """
    now: dict[str, tuple[float | Tensor, float | Tensor]] = {}
    found: list[dict[str, float | Tensor]] = []

    def weights() -> dict[str, float | Tensor]:
        return {name: p for name, (p, _) in now.items()}

    for index in reversed(range(len(recursion.log))):
        found.append(weights())
        for name, linear in recursion.step(index, second_moments(index)):
            p, q = now.get(name, (1.0, 0.0))
            left: float | Tensor = p * (1 - linear.decoupled)
            if linear.coupled:
                q = q - linear.rate * (linear.through * p)
                left = left - linear.rate * (linear.direct * linear.coupled * p) + linear.gain * linear.coupled * q
                q = linear.carry * q
            now[name] = (left, q)
    return found[::-1], weights()
