"""What a search costs, whatever machine it runs on: how many samples' gradients and how many samples' outputs it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Pass:
    samples: int = 0
    differentiated: bool = False


@dataclass
class Evaluations:
    """``gradients``: of one sample each, of one target or of several at once; so a per-sample Jacobian of T targets is T."""

    gradients: int = 0
    passes: list[_Pass] = field(default_factory=list, repr=False)

    @property
    def forwards(self) -> int:
        """Samples that ran through the model for their outputs only: no gradient of that pass was taken."""
        return sum(one.samples for one in self.passes if not one.differentiated)


@contextmanager
def counted(model: nn.Module) -> Iterator[Evaluations]:
    """While inside, everything that ``model`` and copies made of it inside are asked for is counted.

    The model's output passes through an identity that knows its real number of samples, also under ``torch.func`` transforms
    and batched backward passes, and is differentiated when the model is. The output must be one tensor, samples first.
    """
    found = Evaluations()
    times = 1

    def mark(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        found.passes.append(_Pass())
        marked: Tensor = _Output.apply(output, found.passes[-1], back)
        return marked

    def back(samples: int) -> None:
        found.gradients += times * samples

    plain: Any = torch.autograd.grad

    def batched(*args: Any, is_grads_batched: bool = False, **options: Any) -> Any:
        """torch batches these by its older vmap, which knows no rule of a Function's own."""
        nonlocal times
        if not is_grads_batched:
            return plain(*args, **options)
        outputs = options["grad_outputs"] if "grad_outputs" in options else args[2]
        times = len(outputs if isinstance(outputs, Tensor) else outputs[0])
        try:
            return plain(*args, is_grads_batched=True, **options)
        finally:
            times = 1

    handle = model.register_forward_hook(mark)
    torch.autograd.grad = batched
    try:
        yield found
    finally:
        torch.autograd.grad = plain
        handle.remove()


class _Output(torch.autograd.Function):
    """The identity; says how many samples went forward, and backward."""

    @staticmethod
    def forward(output: Tensor, one: _Pass, back: Any) -> Tensor:
        one.samples += len(output)
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Pass, Any], output: Tensor) -> None:
        ctx.one, ctx.back = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.one.differentiated = True
        return _Gradient.apply(gradient, ctx.back), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], output: Tensor, one: _Pass, back: Any) -> tuple[Tensor, int]:
        return _merged(lambda rows: _Output.apply(rows, one, back), output, in_dims[0])


class _Gradient(torch.autograd.Function):
    """The identity on a gradient of the output; says of how many samples it is."""

    @staticmethod
    def forward(gradient: Tensor, back: Any) -> Tensor:
        back(len(gradient))
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], gradient: Tensor, back: Any) -> tuple[Tensor, int]:
        return _merged(lambda rows: _Gradient.apply(rows, back), gradient, in_dims[0])


def _merged(function: Any, x: Tensor, axis: int | None) -> tuple[Tensor, int]:
    """``function`` of the batch axis and the samples in one, ``(batch, samples, ...)``."""
    assert axis is not None
    x = x.movedim(axis, 0)
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2]), 0
