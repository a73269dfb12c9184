"""An optimizer in words: which parameters each of its groups holds, and the hyperparameters it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError
from prunekit.trajectory.bare import local
from prunekit.trajectory.rules import OptimizerRule, find_rule, optimizer_name


def describe_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``{"name": ..., "groups": [{"parameters": [...], hyperparameters...}]}``, JSON values.

    Raises:
        UsageError: the optimizer holds parameters that are not the model's.
    """
    refuse_strangers(model, optimizer)
    known = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        names = [known[id(p)] for p in group["params"] if p.requires_grad]
        groups.append({"parameters": names, **group_options(group)})
    return {"name": optimizer_name(optimizer), "groups": groups}


def describe_optimizers(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """One optimizer as ``describe_optimizer`` has it; several as ``{"name": ..., "optimizers": [one, two, ...]}``.

    Raises:
        UsageError: as above, or two of them hold the same parameter.
    """
    found = [describe_optimizer(model, one) for one in optimizers]
    owners: dict[int, int] = {}
    for number, one in enumerate(optimizers):
        for p in (p for group in one.param_groups for p in group["params"]):
            if owners.setdefault(id(p), number) != number:
                name = next(name for name, own in model.named_parameters() if own is p)
                raise UsageError(f"{name} is held by two of the optimizers; each parameter belongs to one")
    return found[0] if len(found) == 1 else {"name": ", ".join(one["name"] for one in found), "optimizers": found}


def refuse_strangers(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises UsageError when the optimizer holds parameters that are not the model's."""
    known = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    unknown = [p for p in held if id(p) not in known]
    if unknown:
        raise UsageError(
            f"the optimizer holds {len(unknown)} of {len(held)} parameters that are not the model's (shapes "
            f"{', '.join(str(tuple(p.shape)) for p in unknown[:3])}): another model's, or a copy's from before it was pruned, "
            "copied or moved; make it from model.parameters()"
        )


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's scalar hyperparameters as JSON values."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, tuple):
            value = list(value)
        if value is None or isinstance(value, bool | int | float | str | list):
            found[key] = value
    return found


def without_gradient(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters that have no gradient now; a step leaves them alone."""
    known = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [known[id(p)] for p in held if p.requires_grad and p.grad is None]


@torch.no_grad()
def flat_second_moments(model: nn.Module, optimizer: torch.optim.Optimizer, entries: Any, out: Tensor) -> Tensor:
    """Second moments, from where the optimizer's rule says that they are, into the flat vector ``out``; 0 where there are none.

    Of Adam it is the raw ``v`` (amsgrad: its running maximum).

    Raises:
        UsageError: the optimizer keeps a state and no second moments where they are looked for, though its rule needs them or
            it has none.
    """
    out.zero_()
    rule = find_rule(optimizer_name(optimizer))
    places = (rule or OptimizerRule()).moments_in
    parameters = dict(model.named_parameters())
    held = [(entry, state) for entry in entries if (state := optimizer.state.get(parameters[entry.name]))]
    found = [(entry, next((state[place] for place in places if place in state), None)) for entry, state in held]
    if (rule is None or rule.second_moments) and held and all(v is None for _, v in found):
        keys = ", ".join(sorted({str(key) for _, state in held for key in state}))
        raise UsageError(
            f"second_moments: {optimizer_name(optimizer)} has none of {', '.join(places)} in its state (it has {keys}); "
            "give it a rule whose moments_in says where they are (docs/kernel.md), or record without second_moments"
        )
    for entry, v in found:
        if v is not None:
            out[entry.span].copy_(local(v).reshape(-1))
    return out


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that just ended did nothing: a GradScaler leaves it to fused kernels to skip where they find Inf."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())
