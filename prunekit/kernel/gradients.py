"""Gradients of every target of every sample: one by one, which any model takes, faster ways, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from prunekit.batch import Inputs, Labels, by_sample, mapped, size, take
from prunekit.kernel.function import ModelFunction

MEMORY = 256 * 2**20  # bytes of per-sample gradients that ``squares`` holds at a time


class GradientEngine(Protocol):
    """Adds ``scale * gradient`` to an accumulator without the caller ever holding the gradients."""

    def accumulate(self, theta: Tensor, x: Inputs, y: Labels, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """``into[name] += scale[name] * ∂ target / ∂ name`` at ``theta``, elementwise.

        Args:
            theta: flat state ``(P,)``.
            x, y: samples and labels.
            scale: by parameter name, that parameter's shape.
            into: by parameter name, ``(samples, targets, *parameter shape)``.
        """


class MomentEngine(GradientEngine, Protocol):
    """Gives second moments of per-sample gradients too."""

    def squares(self, theta: Tensor, x: Inputs, y: Labels) -> dict[str, Tensor]:
        """``Σ (∂ target / ∂ name)²`` over samples and targets, each of its parameter's shape."""


class _Squares:
    """Second moments of an engine that only accumulates, a block of samples at a time."""

    function: ModelFunction

    def accumulate(self, theta: Tensor, x: Inputs, y: Labels, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        raise AssertionError("an engine has its own")

    def squares(self, theta: Tensor, x: Inputs, y: Labels) -> dict[str, Tensor]:
        entries = self.function.layout.parameters
        ones = self.function.layout.views(torch.ones_like(theta))
        samples = size(x)
        with torch.no_grad():
            targets = self.function(theta, take(x, slice(0, 1)), take(y, slice(0, 1), samples)).shape[1]
        block = max(1, MEMORY // (2 * targets * sum(e.size for e in entries) * theta.element_size()))
        total = {e.name: theta.new_zeros(e.shape) for e in entries}
        for begin in range(0, samples, block):
            where = slice(begin, min(begin + block, samples))
            count = where.stop - begin
            gradients = {e.name: theta.new_zeros(count, targets, *e.shape) for e in entries}
            self.accumulate(theta, take(x, where), take(y, where, samples), ones, gradients)
            for name, gradient in gradients.items():
                total[name].add_(gradient.square_().sum((0, 1)))
        return total


class OneByOne(_Squares):
    """Plain autograd, one sample and target after another. It takes every model that autograd takes, and is the truth here."""

    def __init__(self, function: ModelFunction) -> None:
        self.function = function

    def accumulate(self, theta: Tensor, x: Inputs, y: Labels, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        samples = size(x)
        with self.function.at(theta) as leaves:
            wanted = [leaves[name] for name in into]
            for k in range(samples):
                where = slice(k, k + 1)
                values = self.function.here(take(x, where), take(y, where, samples))[0]
                for number, value in enumerate(values):
                    if not value.requires_grad:
                        continue
                    last = number + 1 == len(values)
                    found = torch.autograd.grad(value, wanted, retain_graph=not last, allow_unused=True)
                    for (name, total), gradient in zip(into.items(), found, strict=True):
                        if gradient is not None:
                            total[k, number].addcmul_(gradient, scale[name])


class VmapGradients(_Squares):
    """Reverse mode per target under ``torch.func.vmap`` over samples, for models without data-dependent branches."""

    def __init__(self, function: ModelFunction) -> None:
        self.function = function

    def accumulate(self, theta: Tensor, x: Inputs, y: Labels, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        state = self.function.layout.views(theta)
        wanted = {name: state[name] for name in into}
        rest = {name: value for name, value in state.items() if name not in into}
        samples = size(x)
        axes = by_sample(x, samples), by_sample(y, samples)

        def one(parameters: dict[str, Tensor], sample: Inputs, label: Labels) -> Tensor:
            sample, label = _with_axis(sample, axes[0]), _with_axis(label, axes[1])
            return self.function.named({**rest, **parameters}, sample, label)[0]

        jacobian = vmap(jacrev(one), in_dims=(None, *axes), randomness="different")(wanted, mapped(x, _same), mapped(y, _same))
        for name, total in into.items():
            total.addcmul_(jacobian[name].detach(), scale[name])


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _with_axis(nest: Inputs, axes: object) -> Inputs:
    """One sample's nest with its axis of samples back, where it had one."""
    if isinstance(nest, Tensor):
        return nest if axes is None else nest[None]
    if isinstance(nest, Mapping):
        assert isinstance(axes, Mapping)
        return {key: _with_axis(value, axes[key]) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        assert isinstance(axes, tuple | list)
        parts = [_with_axis(value, axis) for value, axis in zip(nest, axes, strict=True)]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    return nest


def choose_engine(function: ModelFunction, theta: Tensor, x: Inputs, y: Labels) -> MomentEngine:
    """The fastest engine that gives this model's gradients: by layers, by ``vmap``, or one sample after another.

    Each is compared with plain autograd at ``theta``, target by target on two samples and in sum on all, so none is trusted:
    layer hooks miss weights that are used outside their own layer's forward (perhaps for some samples only), and ``vmap``
    takes neither every operation nor a model's own branches. It is one or the other: a second pass for the few parameters that
    layers miss costs as much as the general engine for all.
    """
    from prunekit.kernel.layer_gradients import LayerwiseGradients

    samples = size(x)
    two = slice(0, min(2, samples))
    few = take(x, two), take(y, two, samples)
    truth = OneByOne(function)
    expected = _gradients(function, truth, theta, *few)
    if not all(bool(gradient.isfinite().all()) for gradient in expected.values()):
        return truth
    fast = LayerwiseGradients(function)
    for engine in (fast, VmapGradients(function)):
        if engine is fast and not fast.covers_all:
            continue
        try:
            found = _gradients(function, engine, theta, *few)
            if _same_numbers(expected, found) and _adds_up(function, engine, theta, x, y):
                return engine
        except Exception:  # whatever an engine or a model under it says to what it does not take: the next one is tried
            continue
    return truth


def _gradients(function: ModelFunction, engine: GradientEngine, theta: Tensor, x: Inputs, y: Labels) -> dict[str, Tensor]:
    """``(samples, targets, *parameter shape)`` by name."""
    with torch.no_grad():
        samples, targets = function(theta, x, y).shape
    found = {e.name: theta.new_zeros(samples, targets, *e.shape) for e in function.layout.parameters}
    engine.accumulate(theta, x, y, function.layout.views(torch.ones_like(theta)), found)
    return found


def _adds_up(function: ModelFunction, engine: GradientEngine, theta: Tensor, x: Inputs, y: Labels) -> bool:
    """Whether the engine's gradients of all samples, each counted otherwise, add up to plain autograd's of that sum."""
    samples = size(x)
    with torch.no_grad():
        targets = function(theta, take(x, slice(0, 1)), take(y, slice(0, 1), samples)).shape[1]
    block = max(1, MEMORY // (2 * targets * function.layout.total * theta.element_size()))
    for begin in range(0, samples, block):
        where = slice(begin, min(begin + block, samples))
        part = take(x, where), take(y, where, samples)
        count = torch.linspace(0.5, 1.5, (where.stop - begin) * targets, dtype=theta.dtype, device=theta.device).view(-1, targets)
        expected = function.layout.views(function.gradient(theta, *part, count)[1])
        single = _gradients(function, engine, theta, *part)
        found = {name: torch.tensordot(count, gradient, 2) for name, gradient in single.items()}
        if not _same_numbers({name: expected[name] for name in found}, found):
            return False
    return True


def _same_numbers(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    """Whether they are the same but for rounding, which is a share of the largest number of all."""
    largest = max(float(value.abs().max()) for value in expected.values() if value.numel())
    return all(torch.allclose(value, found[name], rtol=1e-3, atol=1e-5 * largest) for name, value in expected.items())
