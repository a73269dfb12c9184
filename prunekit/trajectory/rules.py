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

from prunekit.errors import UsageError
from prunekit.registry import Registry
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
    """All that prunekit needs to know of an optimizer. To add one, write ``step`` and enter the class in ``RULES``.

    The other members say which entries of ``optimizer.state[parameter]`` mean what, where that is not what torch's own
    optimizers call it.
    """

    second_moments = False
    """Whether ``step`` needs the recorded second moments (``Recorder(..., second_moments=True)``)."""
    moments_in: tuple[str, ...] = ("max_exp_avg_sq", "exp_avg_sq")
    """Entries of the state that hold second moments; the first of these that is there is recorded, flat and as it is."""
    buffer_in: tuple[str, ...] = ("momentum_buffer", "exp_avg")
    """Entries of the state that hold ``b``, the first of these that is there; it counts where training began with one."""

    def taken(self, state: Mapping[str, Any]) -> int:
        """How many steps a parameter had taken when its optimizer's state was ``state``.

        Optimizers that do not count (SGD) are past their first step, which fills the buffer, once there is one.
        """
        if any(entry in state for entry in self.buffer_in) or "step" in state:
            return int(state.get("step", 1))
        return 0

    def without_second_moments(self, name: str, groups: Sequence[Mapping[str, Any]]) -> OptimizerRule | str:
        """What takes the rule's place where second moments were not recorded: another rule, or a sentence on why none does.

        A rule that does takes data-wise scores out of reach; it only has to say what weight decay did.

        Args:
            name: the optimizer's, for the sentence.
            groups: its parameter groups' hyperparameters.
        """
        return f"{name} needs Recorder(..., second_moments=True) to tell decay from data"

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        """The linear form of one step.

        Args:
            options: the parameter group's hyperparameters at this step.
            count: how many steps this parameter has taken, this one included.
            second_moment: what ``moments_in`` names, after this step, flat, for rules that need it.
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


class NoDecay(OptimizerRule):
    """Adam without weight decay and without recorded second moments: the update is all the data's."""

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        return LinearStep(0.0)


class Adam(OptimizerRule):
    """Adam and AdamW, amsgrad too: ``rate = a / ((1 - β1^t) (sqrt(v / (1 - β2^t)) + ε))`` per weight.

    For amsgrad the recorded ``v`` is the running maximum of the raw second moments, as torch divides by it.
    """

    second_moments = True

    def without_second_moments(self, name: str, groups: Sequence[Mapping[str, Any]]) -> OptimizerRule | str:
        if all(group.get("decoupled_weight_decay") for group in groups):
            return DecoupledDecay()
        if all(group["weight_decay"] == 0 for group in groups):
            return NoDecay()
        return (
            "Adam's coupled weight decay passes through its second moments, which were not recorded (second_moments=True "
            "does): the whole update counts as the data's share"
        )

    def step(self, options: Mapping[str, Any], count: int, second_moment: Tensor | None) -> LinearStep:
        assert second_moment is not None
        first, second = options["betas"]
        spread = (second_moment / (1 - second**count)).sqrt_().add_(options["eps"])
        rate = options["lr"] / ((1 - first**count) * spread)
        decay = options["weight_decay"]
        if options.get("decoupled_weight_decay"):
            return LinearStep(rate, through=1.0, gain=1 - first, carry=first, decoupled=options["lr"] * decay)
        return LinearStep(rate, through=1.0, gain=1 - first, carry=first, coupled=decay)


def as_rule(found: Any, name: str) -> type[OptimizerRule]:
    """A rule's class, as it is. Raises UsageError for anything else."""
    if not (isinstance(found, type) and issubclass(found, OptimizerRule)):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise UsageError(
            f"optimizer rule of {name!r} is {kind}; it must be a subclass of prunekit.trajectory.rules.OptimizerRule"
        )
    return found


RULES: Registry[type[OptimizerRule]] = Registry(
    "optimizer rule",
    "prunekit.optimizers",
    as_rule,
    {"torch.SGD": SGD, "torch.Adam": Adam, "torch.AdamW": Adam},
)
"""By ``optimizer_name``; a user's own optimizer goes in as ``RULES["my_module.MyOptimizer"] = MyRule``, an installed package's as
an entry point of that name; ``Trajectory(folder, rules={"my_module.MyOptimizer": "my_module:MyRule"})`` is about one path."""

Rules = Mapping[str, str | type[OptimizerRule]]
"""By ``optimizer_name``, a rule's class or its import path: what goes before ``RULES``."""


def find_rule(name: str, rules: Rules | None = None) -> OptimizerRule | None:
    """The rule of the optimizer that ``name`` is; None where there is none.

    Raises:
        UsageError: what ``rules`` or a package names cannot be imported, or is no rule.
    """
    given = (rules or {}).get(name)
    if given is not None:
        return (RULES[given] if isinstance(given, str) else as_rule(given, name))()
    rule = RULES.told(name)
    return None if rule is None else rule()


def start_counts(
    described: Mapping[str, Any] | None, states: Mapping[str, Mapping[str, Any]], rules: Rules | None = None
) -> dict[str, int]:
    """How many steps each parameter had taken before the first recorded one, where it had.

    Args:
        described: the optimizers, see ``describe_optimizers``.
        states: by parameter name, its optimizer's state.
    """
    found: dict[str, int] = {}
    for part in optimizer_parts(described):
        rule = find_rule(part["name"], rules)
        for name in (n for group in part["groups"] for n in group["parameters"]):
            if rule is not None and (count := rule.taken(states.get(name, {}))):
                found[name] = count
    return found


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
        foreign: optimizer -> import path of its rule, of rules that are not prunekit's own.
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
        rules: Rules | None = None,
    ) -> None:
        self.log = log
        self.spans = {entry.name: entry.span for entry in layout}
        parts = optimizer_parts(optimizer)
        self.members = [[group["parameters"] for group in part["groups"]] for part in parts]
        found = [_rule_for(part, has_second_moments, rules) for part in parts] or [_rule_for(None, has_second_moments, rules)]
        self.rules = [rule for rule, _, _ in found]
        self.foreign = {
            part["name"]: f"{type(rule).__module__}:{type(rule).__qualname__}"
            for part, rule in zip(parts, self.rules, strict=False)  # one rule, None, where there are no parts
            if rule is not None and type(rule).__module__ != __name__
        }
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

    def buffers(self, start: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """``(name, b)`` of every parameter whose optimizer began with a buffer; ``start``: the state by parameter."""
        owners = zip(self.rules, self.members, strict=False)  # no members of an optimizer that is not known
        rules = {name: rule for rule, members in owners for group in members for name in group}
        for name, state in start.items():
            rule = rules.get(name)
            entry = next((entry for entry in rule.buffer_in if entry in state), None) if rule is not None else None
            if entry is not None and name in self.spans:
                yield name, state[entry]

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


def _rule_for(
    optimizer: Mapping[str, Any] | None, has_second_moments: bool, rules: Rules | None
) -> tuple[OptimizerRule | None, str, bool]:
    if optimizer is None:
        return None, "the optimizer is not known: the whole update counts as the data's share, weight decay included", False
    name = optimizer["name"]
    rule = find_rule(name, rules)
    if rule is None:
        return None, (
            f"no rule for {name}: the whole update counts as the data's share, weight decay included, and "
            "data-wise scores cannot be had (prunekit.trajectory.rules.OptimizerRule says how to add one)"
        ), False  # fmt: skip
    if not rule.second_moments or has_second_moments:
        return rule, "", True
    instead = rule.without_second_moments(name, optimizer["groups"])
    return (None, instead, False) if isinstance(instead, str) else (instead, "", False)


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
