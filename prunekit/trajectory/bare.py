"""What lies inside a wrapper: the model under DDP or torch.compile, the optimizer under accelerate or Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError

WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",  # torch.optim.swa_utils
    "_FabricModule": "_original_module",  # Lightning Fabric
    "DeepSpeedEngine": "module",
}
"""Classes that only wrap a model, and the attribute that holds it."""

PARTED = ("ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer")
"""How optimizers are called that deal their state out over processes (ZeRO)."""

INSIDE = ("optimizer", "_optimizer", "base_optimizer")


def bare(model: nn.Module) -> nn.Module:
    """The user's own model inside torch.compile's, DDP's and the like; a model that is wrapped in nothing as it is.

    Its names are then the same wherever it was trained.

    Raises:
        UsageError: it is no module, or its parameters are flattened and spread over devices (FSDP).
    """
    while isinstance(model, nn.Module):
        kinds = {cls.__name__ for cls in type(model).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise UsageError(
                "the model is wrapped in FullyShardedDataParallel, which flattens its parameters; gather its full state dict "
                "(torch.distributed.checkpoint.state_dict) into the plain model first, or train with fully_shard (FSDP2) and "
                "record that"
            )
        attribute = next((WRAPPERS[kind] for kind in WRAPPERS if kind in kinds), None)
        inside = getattr(model, attribute, None) if attribute is not None else None
        if not isinstance(inside, nn.Module):
            return model
        model = inside
    raise UsageError(f"a model must be a torch.nn.Module, not {type(model).__name__}")


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that takes the steps, inside accelerate's, Lightning's and other wrappers.

    Raises:
        UsageError: there is none.
    """
    seen, inner = {id(optimizer)}, optimizer
    _refuse_parted(inner)
    while not (isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        found = next((getattr(inner, name) for name in INSIDE if hasattr(getattr(inner, name, None), "param_groups")), None)
        if found is None or id(found) in seen:
            raise UsageError(
                f"the optimizer is a {type(optimizer).__name__} and holds no torch.optim.Optimizer; give the one that steps"
            )
        seen.add(id(found))
        inner = found
        _refuse_parted(inner)
    return inner


def _refuse_parted(optimizer: Any) -> None:
    """Raises UsageError for an optimizer that deals its state out over processes by itself."""
    if kind := next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__.startswith(PARTED)), None):
        raise UsageError(
            f"the optimizer is a {kind}, which deals parameters and state out over the processes (ZeRO); its steps cannot be "
            "followed. Shard the model with fully_shard (FSDP2) and a plain torch optimizer instead"
        )


def bare_optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """One optimizer or several, each out of its wrapper.

    Raises:
        UsageError: one is no optimizer, there is none, or one is given twice.
    """
    several = list(given) if isinstance(given, Iterable) and not hasattr(given, "param_groups") else [given]
    found = [bare_optimizer(one) for one in several]
    if not found:
        raise UsageError("a list of optimizers must hold at least one")
    if len({id(one) for one in found}) < len(found):
        raise UsageError("the same optimizer is given twice")
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the model inside its wrappers, by name, tied ones once."""
    model = bare(model)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is spread over processes (DTensor); any other as it is. Call it under ``no_grad``."""
    spread: Any = tensor
    found: Tensor = spread.to_local() if hasattr(spread, "to_local") else tensor
    return found


def reshard(model: nn.Module) -> None:
    """Puts the rows of ``fully_shard`` back where a forward pass without a backward one has left whole parameters."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
