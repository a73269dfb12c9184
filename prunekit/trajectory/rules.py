"""How much of a step is the data's and how much weight decay's: one small class per optimizer.

A step moves the parameters by ``D_s = U_s + R_s``. ``R_s`` follows from weights, learning rates and decay alone
(docs/kernel.md has the table); ``U_s = D_s - R_s`` is what the gradients did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekit.trajectory.layout import Layout


@dataclass(frozen=True)
class StepLog:
    """One optimizer step. ``groups``: each parameter group's hyperparameters as they were used;

    ``batches``: sample indices of each micro-batch, or None when they were not recorded;
    ``without_gradient``: names of parameters whose gradient was None, which the step left alone.
    """

    groups: tuple[Mapping[str, Any], ...]
    batches: tuple[tuple[int, ...], ...] | None = None
    without_gradient: frozenset[str] = frozenset()


class UpdateRule(Protocol):
    """What a rule must offer; a new instance is made for each pass over the path, so it may keep running state."""

    def regularisation(self, state: Tensor, step: StepLog, out: Tensor) -> None:
        """Adds ``R_s`` of the step that leaves ``state`` to the zeroed flat vector ``out``; both are ``(P,)``."""


class WholeUpdate:
    """For optimizers without a rule: everything counts as the data's share."""

    note = "no rule for this optimizer: the whole update counts as the data's share, weight decay included"

    def __init__(self, layout: Layout, members: list[list[str]]) -> None:
        pass

    def regularisation(self, state: Tensor, step: StepLog, out: Tensor) -> None:
        return None


class _GroupedRule:
    """Walks the parameters of each group; a child says what one parameter's share is."""

    def __init__(self, layout: Layout, members: list[list[str]]) -> None:
        spans = {entry.name: entry.span for entry in layout}
        self.groups = [[(name, spans[name]) for name in names] for names in members]

    def regularisation(self, state: Tensor, step: StepLog, out: Tensor) -> None:
        for members, options in zip(self.groups, step.groups, strict=True):
            for name, span in members:
                if name not in step.without_gradient:
                    self.parameter(name, state[span], options, out[span])

    def parameter(self, name: str, theta: Tensor, options: Mapping[str, Any], out: Tensor) -> None:
        raise NotImplementedError


class DecoupledDecay(_GroupedRule):
    """AdamW (Loshchilov & Hutter 2019): ``R_s = -a_s λ θ_s``."""

    def parameter(self, name: str, theta: Tensor, options: Mapping[str, Any], out: Tensor) -> None:
        out.add_(theta, alpha=-options["lr"] * options["weight_decay"])


class SGDRule(_GroupedRule):
    """SGD with momentum μ, dampening, Nesterov and coupled decay λ, as torch computes it.

    ``r_s = μ r_{s-1} + d_s λ θ_s``, ``d_s`` = 1 at a parameter's first buffered step, else 1 - dampening;
    ``R_s = -a_s r_s``, or ``-a_s (λ θ_s + μ r_s)`` with Nesterov.
    """

    def __init__(self, layout: Layout, members: list[list[str]]) -> None:
        super().__init__(layout, members)
        self.running: dict[str, Tensor] = {}

    def parameter(self, name: str, theta: Tensor, options: Mapping[str, Any], out: Tensor) -> None:
        rate, decay, momentum = options["lr"], options["weight_decay"], options["momentum"]
        if momentum == 0:
            out.add_(theta, alpha=-rate * decay)
            return
        if name not in self.running:
            self.running[name] = decay * theta
        else:
            self.running[name].mul_(momentum).add_(theta, alpha=(1 - options["dampening"]) * decay)
        if options["nesterov"]:
            out.add_(theta, alpha=-rate * decay)
            out.add_(self.running[name], alpha=-rate * momentum)
        else:
            out.add_(self.running[name], alpha=-rate)


class NoDecay(WholeUpdate):
    """Adam without weight decay: the update is all the data's."""

    note = ""


def rule_for(optimizer: Mapping[str, Any] | None) -> type:
    """The rule class for a recorded optimizer description (``{"name": ..., "groups": [...]}``)."""
    if optimizer is None:
        return WholeUpdate
    name, groups = optimizer["name"], optimizer["groups"]
    if name == "torch.SGD":
        return SGDRule
    if name == "torch.AdamW" or (name == "torch.Adam" and all(g.get("decoupled_weight_decay") for g in groups)):
        return DecoupledDecay
    if name == "torch.Adam" and all(g["weight_decay"] == 0 for g in groups):
        return NoDecay
    return WholeUpdate  # Adam's coupled decay passes through its second moments, which are not recorded


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """``torch.AdamW`` for torch's own classes, the import path for anything else (a subclass may differ)."""
    cls = type(optimizer)
    own = cls.__module__.startswith("torch.optim.")
    return f"torch.{cls.__name__}" if own else f"{cls.__module__}.{cls.__qualname__}"
