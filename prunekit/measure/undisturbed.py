"""Running a model without leaving a trace: its mode, its buffers and the stream of random numbers are put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Inputs, device_of, to


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While inside, the model is in evaluation mode; afterwards, also after an error, everything is as it was."""
    modes = {module: module.training for module in model.modules()}
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                buffer.copy_(value)


def placed(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs on the model's device, floating-point numbers in the model's type where it has one alone.

    All is copied, so that the caller's stays as it is: a model may change tensors in place, and caches from call to call.
    """
    types = {t.dtype for t in model.parameters() if t.is_floating_point()}
    if types or next(model.buffers(), None) is not None:
        inputs = to(inputs, device_of(model))
    return _own(inputs, types.pop() if len(types) == 1 else None)


def _own(nest: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(nest, Tensor):
        return nest.to(dtype if dtype is not None and nest.is_floating_point() else nest.dtype, copy=True)
    if type(nest) is dict or (isinstance(nest, Mapping) and not hasattr(nest, "__dict__")):
        return {key: _own(value, dtype) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [_own(value, dtype) for value in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    return copy.deepcopy(nest)
