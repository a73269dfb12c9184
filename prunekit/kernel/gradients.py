"""Gradients of every target of every sample: the general way, which any model takes, and the choice between ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from prunekit.kernel.function import ModelFunction

MEMORY = 256 * 2**20  # bytes of per-sample gradients that ``squares`` holds at a time


class GradientEngine(Protocol):
    """Adds ``scale * gradient`` to an accumulator without the caller ever holding the gradients."""

    def accumulate(self, theta: Tensor, x: Tensor, y: Tensor, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """``into[name] += scale[name] * ∂ target / ∂ name`` at ``theta``, elementwise.

        Args:
            theta: flat state ``(P,)``.
            x, y: samples and labels.
            scale: by parameter name, that parameter's shape.
            into: by parameter name, ``(samples, targets, *parameter shape)``.
        """


class MomentEngine(GradientEngine, Protocol):
    """Gives second moments of per-sample gradients too."""

    def squares(self, theta: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """``Σ (∂ target / ∂ name)²`` over samples and targets, each of its parameter's shape."""


class VmapGradients:
    """Reverse mode per target under ``torch.func.vmap`` over samples; works for every differentiable model."""

    def __init__(self, function: ModelFunction) -> None:
        self.function = function

    def accumulate(self, theta: Tensor, x: Tensor, y: Tensor, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        state = self.function.layout.views(theta)
        wanted = {name: state[name] for name in into}
        rest = {name: value for name, value in state.items() if name not in into}

        def one(parameters: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
            return self.function.named({**rest, **parameters}, sample[None], label[None])[0]

        jacobian = vmap(jacrev(one), in_dims=(None, 0, 0), randomness="different")(wanted, x, y)
        for name, total in into.items():
            total.addcmul_(jacobian[name].detach(), scale[name])

    def squares(self, theta: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        entries = self.function.layout.parameters
        ones = self.function.layout.views(torch.ones_like(theta))
        with torch.no_grad():
            targets = self.function(theta, x[:1], y[:1]).shape[1]
        block = max(1, MEMORY // (2 * targets * sum(e.size for e in entries) * theta.element_size()))
        total = {e.name: theta.new_zeros(e.shape) for e in entries}
        for i in range(0, len(x), block):
            part = x[i : i + block]
            gradients = {e.name: theta.new_zeros(len(part), targets, *e.shape) for e in entries}
            self.accumulate(theta, part, y[i : i + block], ones, gradients)
            for name, gradient in gradients.items():
                total[name].add_(gradient.square_().sum((0, 1)))
        return total


def choose_engine(function: ModelFunction, theta: Tensor, x: Tensor, y: Tensor) -> MomentEngine:
    """The layer-wise engine when it gives this model's gradients, else the general one.

    Layer hooks miss weights that are used outside their own layer's forward (tied through a function, say), so
    the choice is made by comparing both on two samples at ``theta``, not by trusting layer types. It is one or the
    other: a second pass for the few parameters that layers miss costs as much as the general engine for all.
    """
    from prunekit.kernel.layerwise import LayerwiseGradients

    general, fast = VmapGradients(function), LayerwiseGradients(function)
    if not fast.covers_all:
        return general
    x, y = x[:2], y[:2]
    targets = function(theta, x, y).shape[1]
    ones = function.layout.views(torch.ones_like(theta))
    expected, found = ({e.name: theta.new_zeros(len(x), targets, *e.shape) for e in function.layout.parameters} for _ in range(2))
    general.accumulate(theta, x, y, ones, expected)
    try:
        fast.accumulate(theta, x, y, ones, found)
    except (RuntimeError, IndexError, ValueError, AssertionError):  # what a model says to shapes it does not expect
        return general
    for name, right in expected.items():
        if not torch.allclose(right, found[name], rtol=1e-3, atol=1e-5 * float(right.abs().max() + 1)):
            return general
    return fast
