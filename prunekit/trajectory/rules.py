"""How an optimizer turns gradients and weights into steps: one small class per optimizer, linear in the gradient.

Given its learning rates and second moments, every optimizer here is a linear recursion per weight,

    b_s      = carry b_{s-1} + gain (g_s + λ θ_s)
    θ_{s+1}  = θ_s - rate (direct (g_s + λ θ_s) + through b_s) - decoupled θ_s

so one description (``LinearStep``) yields what weight decay did (``R_s``), what survives of an early move, and what a
training sample's gradient did (docs/kernel.md).
"""

from __future__ import annotations

from bisect import bisect_right
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
        optimizer: which of several stepped; the others' parameters were left alone.
        behind: how many states before this step its gradient was taken; not 0 where optimizers step one after another on one
            backward pass.
    """

    groups: tuple[Mapping[str, Any], ...] = ()
    batches: tuple[tuple[int, ...], ...] | None = None
    weights: tuple[float, ...] = ()
    seeds: tuple[int | None, ...] = ()
    gradient_scale: float = 1.0
    without_gradient: frozenset[str] = frozenset()
    moved: bool = True
    optimizer: int = 0
    behind: int = 0


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


def optimizer_parts(described: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The optimizers of a recording, one by one; none where it is not known."""
    if described is None:
        return []
    if not isinstance(described, Mapping):
        raise TypeError(f"the optimizer is a {type(described).__name__}")
    found: list[dict[str, Any]] = described.get("optimizers", [described])
    return found


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
        parts = optimizer_parts(optimizer)
        self.members = [[group["parameters"] for group in part["groups"]] for part in parts]
        found = [_rule_for(part, has_second_moments) for part in parts] or [_rule_for(None, has_second_moments)]
        self.rules = [rule for rule, _, _ in found]
        self.note = "; ".join(dict.fromkeys(note for _, note, _ in found if note))
        self.explains_data = all(explains for _, _, explains in found)
        self._counts = dict(start_counts)
        self.taken = list(accumulate(int(step.moved) for step in log))
        self._left = self._left_alone() if len(parts) > 1 or any(step.without_gradient for step in log) else {}

    def _left_alone(self) -> dict[str, list[int]]:
        """By parameter, the steps that left it alone: without a gradient, or another optimizer's."""
        every = [{name for group in members for name in group} for members in self.members]
        found: dict[str, list[int]] = {}
        for index, step in enumerate(self.log):
            if step.moved:
                others = (names for number, names in enumerate(every) if number != step.optimizer)
                for name in step.without_gradient.union(*others):
                    found.setdefault(name, []).append(index)
        return found

    def step(self, index: int, second_moments: Tensor | None) -> Iterator[tuple[str, LinearStep]]:
        """``(name, linear step)`` of every parameter that moved at step ``index``."""
        step = self.log[index]
        rule = self.rules[step.optimizer]
        if rule is None or not step.moved:
            return
        for members, options in zip(self.members[step.optimizer], step.groups, strict=False):  # groups may be added later
            for name in members:
                if name in step.without_gradient or name not in self.spans:
                    continue
                v = None if second_moments is None else second_moments[self.spans[name]]
                yield name, rule.step(options, self._count(name, index), v)

    def _count(self, name: str, index: int) -> int:
        return self._counts.get(name, 0) + self.taken[index] - bisect_right(self._left.get(name, ()), index)

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
