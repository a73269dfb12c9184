"""Masks on a dense model: set once, or held through any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ArtifactError
from prunekit.plan import Plan


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeroes the removed weights of ``model`` in place.

    Raises:
        ArtifactError: a mask names no parameter or buffer of the model, or has another shape.
    """
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, mask in masks.items():
        tensor = named.get(name)
        if tensor is None:
            raise ArtifactError(f"mask {name}: the model has no such parameter")
        if tensor.shape != mask.shape:
            raise ArtifactError(f"mask {name}: shape {tuple(mask.shape)}, the parameter's is {tuple(tensor.shape)}")
        tensor.mul_(mask.to(tensor.device, tensor.dtype))


@contextmanager
def hold_masks(model: nn.Module, plan: Plan | Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keeps removed weights at exactly 0 while ``optimizer`` trains ``model``, whatever loop does it.

    They are zeroed now and after every step. Enter it before a ``Recorder``, so that states are recorded with the
    masks in place.

    Args:
        plan: a plan, or masks by parameter name (True stays). On a model that a plan has cut already, single weights
            that it removes are held; units are gone.
    """
    if isinstance(plan, Plan):
        dense = all(plan.shapes.get(name) == tuple(p.shape) for name, p in model.named_parameters())
        masks: Mapping[str, Tensor] = plan.masks() if dense and not plan.skipped() else plan.weight_masks()
    else:
        masks = plan
    apply_masks(model, masks)

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        apply_masks(model, masks)

    hook = optimizer.register_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()
