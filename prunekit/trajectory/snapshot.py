"""Going on after a crash: optimizer, schedule and random state, written now and then, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError

NAME = "snapshot.safetensors"


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as ``<parameter>|<key>`` -> tensor (copies); numbers become 0-d tensors."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for parameter, state in (item for one in optimizers for item in one.state.items()):
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[f"{names[id(parameter)]}|{key}"] = value.detach().cpu().clone()
            elif isinstance(value, bool | int | float):
                found[f"{names[id(parameter)]}|{key}"] = torch.tensor(value)
    return found


def take(
    step: int, lines: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rows: dict[str, int]
) -> dict[str, Any]:
    """Copies weights, optimizer and random state as a step leaves them; ``add_schedule`` completes it.

    Args:
        step: steps taken; ``lines``: of the log by then, states that were set included; ``rows``: by stream.
    """
    tensors = {f"optimizer|{k}": v for k, v in optimizer_tensors(model, optimizers).items()}
    tensors |= {f"model|{k}": v.detach().cpu().clone() for k, v in checkpoint.unique_state(model.state_dict())[0].items()}
    tensors["random|cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and any(p.is_cuda for p in model.parameters()):
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    return {"tensors": tensors, "header": {"kind": "snapshot", "schema": 1, "step": step, "lines": lines, "rows": rows}}


def add_schedule(taken: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer], scheduler: Any) -> None:
    """Adds rates and schedule as the *next* step finds them: a loop moves its schedule after the step."""
    schedule = [{k: v for k, v in one.state_dict().items() if _is_json(v)} for one in _several(scheduler)]
    options = [
        {k: v for k, v in group.items() if k != "params" and _is_json(v)} for one in optimizers for group in one.param_groups
    ]
    taken["header"] |= {"schedule": schedule, "options": options}


def write(folder: Path, taken: dict[str, Any]) -> None:
    """Replaces the folder's snapshot."""
    checkpoint.write_tensors(folder / NAME, taken["tensors"], taken["header"])


def restore(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scheduler: Any) -> dict[str, Any]:
    """Puts model, optimizers, schedule and random state back; returns the snapshot's header (``step``, ``rows``).

    Raises:
        ArtifactError: there is no snapshot, or it is another model's.
    """
    header = checkpoint.read_header(folder / NAME, "snapshot")
    tensors = checkpoint.read_tensors(folder / NAME)
    state = {k.removeprefix("model|"): v for k, v in tensors.items() if k.startswith("model|")}
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ArtifactError(f"{folder / NAME}: {name} {tuple(tensor.shape)} does not fit the model")
    model.load_state_dict(state, strict=False)
    parameters = dict(model.named_parameters())
    owners = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    for one in optimizers:
        one.state.clear()
    for key, tensor in tensors.items():
        if key.startswith("optimizer|"):
            name, entry = key.removeprefix("optimizer|").rsplit("|", 1)
            parameter = parameters[name]
            owner = owners.get(id(parameter))
            if owner is None:
                raise ArtifactError(f"{folder / NAME}: {name} is in none of the optimizers, and was when it was written")
            where = torch.device("cpu") if entry == "step" and not _capturable(owner) else parameter.device
            owner.state[parameter][entry] = tensor.to(where)
    groups = [group for one in optimizers for group in one.param_groups]
    if len(groups) != len(header["options"]):
        raise ArtifactError(f"{folder / NAME}: has {len(header['options'])} parameter groups, the optimizers {len(groups)}")
    for group, options in zip(groups, header["options"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    schedules = header["schedule"] or []
    for one, state in zip(_several(scheduler), schedules if isinstance(schedules, list) else [schedules], strict=False):
        one.load_state_dict({**one.state_dict(), **state})
    torch.set_rng_state(tensors["random|cpu"])
    if "random|cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random|cuda"])
    return header


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)


def _several(scheduler: Any) -> list[Any]:
    return [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
