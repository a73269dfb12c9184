"""Running statistics as coordinates of the path: normalisation in evaluation mode, differentiable in its mean and variance.

Torch's own is not: it has no derivative by them. A training step moves them, and the outputs with them, so they belong to what
is explained. In torch 2.13 its derivative by the inputs is wrong as well for one sample on a CPU whose gradient comes back
transposed (``BatchNorm2d``, then ``flatten(2).transpose(1, 2)``); this one is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""Forward passes that do nothing but normalise; a subclass may do more (timm's activates)."""


def differentiable_statistics(model: nn.Module) -> None:
    """Puts the differentiable forward pass into plain layers; others are met by ``Statistics``."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and type(module).forward in PLAIN:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def own_statistics(model: nn.Module) -> None:
    """As in training: every batch has its own statistics, and none are updated, since states are read only."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.__dict__.pop("forward", None)
            module.track_running_stats = False


class Statistics(TorchFunctionMode):
    """Inside, normalisations of ``torch.nn.functional`` by given statistics are differentiable in them; ``met``: one ran."""

    met = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in SIGNATURES:
            signature, own = SIGNATURES[function]
            given = signature.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            found = given.arguments
            if not found[own] and found["running_mean"] is not None:
                self.met = True
                statistics = found["running_mean"], found["running_var"]
                return _normalised(found["input"], *statistics, found["weight"], found["bias"], found["eps"])
        return function(*args, **(kwargs or {}))


SIGNATURES = {
    F.batch_norm: (inspect.signature(F.batch_norm), "training"),
    F.instance_norm: (inspect.signature(F.instance_norm), "use_input_stats"),
}
"""Function -> its arguments, and which of them says that the batch's own statistics count."""


def _forward(module: _BatchNorm, x: Tensor) -> Tensor:
    assert module.running_mean is not None
    assert module.running_var is not None
    return _normalised(x, module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = (x - mean.view(shape)) * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)
