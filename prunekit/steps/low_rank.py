"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a pruned model: its layers' weights move by masked products of two thin matrices.

A weight ``W`` of shape ``(out, in)`` and mask ``m`` computes with ``m ⊙ (W + s B A)``, where ``A (r, in)`` is drawn from a normal
distribution of variance ``1 / in``, ``B (out, r)`` begins at 0 and ``s = α / r`` is 2 (``α = 2 r``). Only A and B are trained.

The model holds that product all the time, in the place of ``W``: a step moves it by ``m ⊙ s (B' A' - B A)``. So there is nothing
to merge in the end, removed weights are 0 throughout, masks may shrink on the way, and the model is an ordinary one for whatever
looks at it. A weight's gradient ``G`` lives until the backward pass has made ``s (m ⊙ G) Aᵀ`` and ``s Bᵀ (m ⊙ G)`` of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply.masks import after_steps
from prunekit.errors import Note, UsageError
from prunekit.structure.roles import Role, weight_roles
from prunekit.trajectory.bare import bare
from prunekit.trajectory.derived import derived_weights

SCALE = 2.0
"""``s = α / r``: the same for every rank."""


@dataclass(frozen=True)
class Adapted:
    """Which weights a rank adapts.

    Attributes:
        rank: as it was asked for; a layer of fewer inputs or outputs has as many as these.
        roles: by name, the axes of every weight that is adapted.
        shapes: of these weights.
        held: prunable weights that stay as they are, and why.
    """

    rank: int
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, int]]
    held: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, rank: int, prunable: Sequence[str] | None = None) -> Adapted:
        """Every prunable weight with two axes, but for embeddings, those that are tied to one, and computed ones.

        Args:
            prunable: names of parameters; None for the weights of all layers.

        Raises:
            UsageError: the rank is below 1 or larger than any layer has inputs and outputs, there is nothing to adapt, a weight
                is in half precision, or several processes train together.
        """
        if rank < 1:
            raise UsageError(f"lora is {rank}; the rank must be 1 or more")
        if ranks.size() > 1:
            raise UsageError("lora trains in one process; start it without torchrun, or leave lora out")
        model = bare(model)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        computed = {part: one.how for one in derived_weights(model) for part in one.parts}
        roles, named = weight_roles(model), dict(model.named_parameters())
        asked = set(roles if prunable is None else prunable)
        found, held = {}, {}
        for name, parameter in named.items():
            if not parameter.requires_grad or name not in asked:
                continue
            if id(parameter) in embeddings:
                held[name] = "an embedding"
            elif name in computed:
                held[name] = f"{computed[name]} computes a weight from it"
            elif parameter.dim() != 2 or name not in roles:
                held[name] = f"{parameter.dim()} axes" if parameter.dim() != 2 else "no layer's weight"
            else:
                found[name] = roles[name]
        if not found:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(held.items())[:3])
            raise UsageError(f"lora: no weight to adapt, which is a prunable one with two axes{f' ({why})' if why else ''}")
        for name in found:
            if named[name].element_size() < 4:
                raise UsageError(
                    f"lora: {name} is {named[name].dtype}, in which small moves are lost; widen the model to float32"
                )
        largest = max(found, key=lambda name: min(named[name].shape))
        if rank > min(named[largest].shape):
            size = " x ".join(map(str, named[largest].shape))
            raise UsageError(
                f"lora is {rank}, and no weight has so many inputs and outputs: {largest} is {size}; give "
                f"{min(named[largest].shape)} at most"
            )
        shapes = {name: (named[name].shape[role.output], named[name].shape[role.input]) for name, role in found.items()}
        return cls(rank, found, shapes, held)

    def rank_of(self, name: str) -> int:
        return min(self.rank, *self.shapes[name])

    @property
    def trained(self) -> int:
        """How many values are trained."""
        return sum(self.rank_of(name) * sum(shape) for name, shape in self.shapes.items())

    def facts(self) -> dict[str, Any]:
        """What is told of it, as JSON values; ``of``: how many weights its matrices move."""
        moved = sum(outputs * inputs for outputs, inputs in self.shapes.values())
        return {"rank": self.rank, "scale": SCALE, "trained": self.trained, "of": moved, "held": self.held}


class Factors(nn.Module):
    """``A`` and ``B`` of one weight, and how they were when the weight was last moved."""

    def __init__(self, weight: Tensor, outputs: int, inputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(rank, inputs, generator=generator, dtype=weight.dtype) / inputs**0.5
        self.a = nn.Parameter(drawn.to(weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device))
        self._before = (self.a.detach().clone(), self.b.detach().clone())

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Adds what a gradient ``(out, in)`` of the weight is to A and B."""
        for factor, found in ((self.a, self.b.T @ gradient), (self.b, gradient @ self.a.T)):
            found.mul_(SCALE)
            factor.grad = found if factor.grad is None else factor.grad.add_(found)

    @torch.no_grad()
    def move(self, weight: Tensor) -> None:
        """Moves a weight ``(out, in)`` by what A and B have changed since.

        ``B' A' - B A = (B' - B) A' + B (A' - A)``: differences first, so that little is rounded.
        """
        a, b = self._before
        weight.addmm_(torch.cat([self.b - b, b], 1), torch.cat([self.a, self.a - a]), alpha=SCALE)
        a.copy_(self.a)
        b.copy_(self.b)


class LowRank(nn.Module):
    """The matrices of all adapted weights; its parameters are what an optimizer is made for.

    With Adam they take 20 bytes a value in single precision: values, gradients, two moments, and the values before a step.

    Args:
        model: whose weights they move, on its device.
        adapted: which.
        seed: of the random matrices.
    """

    def __init__(self, model: nn.Module, adapted: Adapted, seed: int) -> None:
        super().__init__()
        named = dict(bare(model).named_parameters())
        generator = torch.Generator().manual_seed(seed)
        self.adapted = adapted
        self._model = [bare(model)]  # in a list, so that its parameters are none of this module's
        self._weights = {name: named[name] for name in adapted.shapes}
        self._masks: Mapping[str, Tensor] = {}
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}
        self._unreached = set(adapted.shapes)
        self.factors = nn.ModuleList(
            Factors(named[name], *shape, adapted.rank_of(name), generator) for name, shape in adapted.shapes.items()
        )

    @contextmanager
    def followed(self, masks: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
        """While inside, every step moves the model's weights; ``masks`` may change on the way.

        Raises:
            UsageError: an optimizer trains something else.
        """
        own = {id(parameter) for parameter in self.parameters()}
        if any(id(p) not in own for one in optimizers for group in one.param_groups for p in group["params"]):
            raise UsageError("lora: the optimizer trains other parameters; make it from those of the module that it is given")
        self._masks = masks

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self.follow()

        with after_steps(optimizers, after_step):
            yield

    def follow(self) -> None:
        """Moves the model's weights by what the matrices have changed; masks are put back by others."""
        for name, factors in self._each():
            factors.move(self._by_outputs(name, self._weights[name].detach()))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While inside, backward passes of the model end at A and B, and everything else of it is fixed.

        Warns of weights that no gradient has come to in the end.
        """
        parameters = list(self._model[0].parameters())
        before = [parameter.requires_grad for parameter in parameters]
        adapted = {id(weight) for weight in self._weights.values()}
        hooks = [
            self._weights[name].register_post_accumulate_grad_hook(partial(self._taken, name, factors))
            for name, factors in self._each()
        ]
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in adapted)
            parameter.grad = None
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, needed in zip(parameters, before, strict=True):
                parameter.requires_grad_(needed)
        if self._unreached:
            warnings.warn(
                f"lora: no gradient came to {', '.join(sorted(self._unreached)[:3])}{' …' if len(self._unreached) > 3 else ''}, "
                "which stay as they were (a layer that was never called, or blocks under checkpoint(use_reentrant=True))",
                Note,
                stacklevel=4,
            )

    def _each(self) -> Iterator[tuple[str, Factors]]:
        for name, factors in zip(self._weights, self.factors, strict=True):
            assert isinstance(factors, Factors)
            yield name, factors

    @torch.no_grad()
    def _taken(self, name: str, factors: Factors, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        self._unreached.discard(name)
        mask = self._mask(name, gradient.device)
        factors.take(self._by_outputs(name, gradient if mask is None else gradient * mask))

    def _mask(self, name: str, device: torch.device) -> Tensor | None:
        """The weight's present mask on ``device``, where it stays: 1 byte a weight; None where nothing is removed."""
        mask = self._masks.get(name)
        if mask is None or mask.device == device:
            return mask
        if name not in self._placed or self._placed[name][0] is not mask:
            self._placed[name] = (mask, mask.to(device))
        return self._placed[name][1]

    def _by_outputs(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` in the weight's shape as ``(out, in)``."""
        return tensor if self.adapted.roles[name].output == 0 else tensor.T
