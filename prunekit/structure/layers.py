"""Whole residual blocks: those that do nothing once their weights are 0, found by running them so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.structure.cut import Prober, put
from prunekit.structure.groups import SKIP, Group, tied_names


@torch.no_grad()
def layer_groups(prober: Prober) -> tuple[list[Group], dict[str, str]]:
    """A group of one unit for every block that can go, and the refused, with reasons.

    Blocks are the outermost members of an ``nn.Sequential`` or ``nn.ModuleList`` that hold parameters. One can go when,
    with all its tensors at 0, it gives back its first input exactly (on the inputs that the examples bring it).
    """
    found: list[Group] = []
    refused: dict[str, str] = {}
    tied = tied_names(prober.model)
    for name, block in _blocks(prober.model):
        reason = _identity_fault(prober, name, block)
        members = {
            f"{name}.{key}@0": torch.arange(tensor.shape[0])[None]
            for key, tensor in [*block.named_parameters(), *block.named_buffers()]
            if tensor.dim() and (tensor.is_floating_point() or isinstance(tensor, nn.Parameter))
        }
        bound = next((m[:-2] for m in members if m[:-2] in tied and not tied[m[:-2]].startswith(f"{name}.")), None)
        if bound is not None:
            reason = f"{bound} is tied to {tied[bound]}; surgery would untie them"
        if reason is None:
            found.append(Group(name, members, {}, {name: SKIP}))
        else:
            refused[name] = reason
    return found, refused


def _blocks(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Outermost members of containers; a container's own members, when it lies in another, are looked at as one."""
    found = []
    for short, child in model.named_children():
        name = f"{prefix}{short}"
        if isinstance(model, (nn.Sequential, nn.ModuleList)) and not isinstance(child, nn.ModuleList):
            if next(child.parameters(), None) is not None:
                found.append((name, child))
        else:
            found += _blocks(child, f"{name}.")
    return found


def _identity_fault(prober: Prober, name: str, block: nn.Module) -> str | None:
    """Why ``block`` is not the identity once its tensors are 0; None when it is."""
    calls: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        prober.outputs()
    finally:
        hook.remove()
    if not calls:
        return "is not called as a module on the example inputs"
    if any(not args or not isinstance(args[0], Tensor) for args, _ in calls):
        return "its first input is no tensor"
    with prober.restoring():
        for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.is_floating_point():
                put(block, key, torch.zeros_like(tensor))
        for args, kwargs in calls:
            try:
                out = block(*args, **kwargs)
            except Exception as error:  # the user's own module
                return f"it does not run with its weights at 0 ({' '.join(str(error).split())[:120]})"
            if not isinstance(out, Tensor):
                return f"it returns a {type(out).__name__}, not a tensor"
            if out.shape != args[0].shape:
                return f"it turns {tuple(args[0].shape)} into {tuple(out.shape)}, so it is no residual block"
            if not torch.equal(out, args[0]):
                return "with its weights at 0 it does not give back its input, so it is no residual block"
    return None
