"""Going on after a crash: optimizer, schedule and random state, written now and then, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError
from prunekit.trajectory.layout import Layout

NAME = "snapshot.safetensors"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>|<key>`` -> tensor (copies); numbers become 0-d tensors."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[f"{names[id(parameter)]}|{key}"] = value.detach().cpu().clone()
            elif isinstance(value, bool | int | float):
                found[f"{names[id(parameter)]}|{key}"] = torch.tensor(value)
    return found


def take(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, int]) -> dict[str, Any]:
    """Copies weights, optimizer and random state as a step leaves them; ``add_schedule`` completes it."""
    tensors = {f"optimizer|{k}": v for k, v in optimizer_tensors(model, optimizer).items()}
    tensors |= {f"model|{k}": v.detach().cpu().clone() for k, v in checkpoint.unique_state(model.state_dict())[0].items()}
    tensors["random|cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and any(p.is_cuda for p in model.parameters()):
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    return {"tensors": tensors, "header": {"kind": "snapshot", "schema": 1, "step": step, "rows": rows}}


def add_schedule(taken: dict[str, Any], optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Adds rates and schedule as the *next* step finds them: a loop moves its schedule after the step."""
    schedule = {k: v for k, v in scheduler.state_dict().items() if _is_json(v)} if scheduler is not None else None
    options = [{k: v for k, v in group.items() if k != "params" and _is_json(v)} for group in optimizer.param_groups]
    taken["header"] |= {"schedule": schedule, "options": options}


def write(folder: Path, taken: dict[str, Any]) -> None:
    """Replaces the folder's snapshot."""
    checkpoint.write_tensors(folder / NAME, taken["tensors"], taken["header"])


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Puts model, optimizer, schedule and random state back; returns the snapshot's header (``step``, ``rows``).

    Raises:
        ArtifactError: there is no snapshot, or it is another model's.
    """
    header = checkpoint.read_header(folder / NAME, "snapshot")
    tensors = checkpoint.read_tensors(folder / NAME)
    Layout.of(model)
    state = {k.removeprefix("model|"): v for k, v in tensors.items() if k.startswith("model|")}
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ArtifactError(f"{folder / NAME}: {name} {tuple(tensor.shape)} does not fit the model")
    model.load_state_dict(state, strict=False)
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in tensors.items():
        if key.startswith("optimizer|"):
            name, entry = key.removeprefix("optimizer|").rsplit("|", 1)
            parameter = parameters[name]
            where = torch.device("cpu") if entry == "step" and not _capturable(optimizer) else parameter.device
            optimizer.state[parameter][entry] = tensor.to(where)
    for group, options in zip(optimizer.param_groups, header["options"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    if scheduler is not None and header["schedule"] is not None:
        scheduler.load_state_dict({**scheduler.state_dict(), **header["schedule"]})
    torch.set_rng_state(tensors["random|cpu"])
    if "random|cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random|cuda"])
    return header


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
