"""The factor that a loop's clipping puts on the gradient, told by the norms before and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Clipping:
    """Compares the gradient as it was accumulated with the gradient that the optimizer takes.

    A loop that is not ours clips between its last backward pass and the step, and tells nobody. Clipping by norm multiplies
    every gradient by one factor, so the ratio of the norms is that factor. In one process only: several average their
    gradients in between.

    Args:
        parameters: those that are trained.
        note: called with the factor before a step whose gradient was clipped.
        scale: what a GradScaler has multiplied the loss by; it is divided out before clipping.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        note: Callable[[float], None],
        scale: Callable[[], float],
    ) -> None:
        self._parameters, self._optimizers, self._note, self._scale = list(parameters), list(optimizers), note, scale
        self._before: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Clipping:
        self._hooks = [one.register_step_pre_hook(self._before_step) for one in self._optimizers]
        self._hooks += [p.register_post_accumulate_grad_hook(self._after_gradient) for p in self._parameters]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _after_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._before[id(parameter)] = torch.linalg.vector_norm(parameter.grad.float())

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._before:
            return
        scaled = getattr(optimizer, "grad_scale", None) is not None  # a fused kernel divides by the scale itself
        before = _norm(list(self._before.values())) / (1.0 if scaled else self._scale())
        came = [p.grad for p in self._parameters if p.grad is not None and id(p) in self._before]
        after = _norm([torch.linalg.vector_norm(gradient.float()) for gradient in came])
        self._before.clear()
        if before > 0 and math.isfinite(before) and math.isfinite(after) and not math.isclose(before, after, rel_tol=1e-6):
            self._note(after / before)


def _norm(norms: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([n.cpu() for n in norms]).double())) if norms else 0.0
