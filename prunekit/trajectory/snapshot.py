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
from prunekit.trajectory.bare import local
from prunekit.trajectory.shards import held_rows, is_spread, once, shares

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
    step: int,
    lines: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: dict[str, int],
    rank: int = 0,
) -> dict[str, Any]:
    """Copies weights, optimizer and random state as a step leaves them; ``add_schedule`` completes it.

    Args:
        step: steps taken; ``lines``: of the log by then, states that were set included; ``rows``: by stream.
        rank: of the process; of what is spread over several, it takes its own rows.
    """
    whole = {f"optimizer|{k}": v for k, v in optimizer_tensors(model, optimizers).items()}
    whole |= {f"model|{k}": v.detach().cpu().clone() for k, v in once(model.state_dict()).items()}
    tensors, places = shares(whole, rank)
    tensors |= random_states(model)
    header = {"kind": "snapshot", "schema": 1, "step": step, "lines": lines, "rows": rows}
    return {"tensors": tensors, "header": {**header, **({"places": places} if places else {})}}


def random_states(model: nn.Module) -> dict[str, Tensor]:
    """torch's random states in this process."""
    found = {"random|cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and any(p.is_cuda for p in model.parameters()):
        found["random|cuda"] = torch.cuda.get_rng_state()
    return found


def add_schedule(taken: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer], scheduler: Any) -> None:
    """Adds rates and schedule as the *next* step finds them: a loop moves its schedule after the step."""
    schedule = [{k: v for k, v in one.state_dict().items() if _is_json(v)} for one in _several(scheduler)]
    options = [
        {k: v for k, v in group.items() if k != "params" and _is_json(v)} for one in optimizers for group in one.param_groups
    ]
    taken["header"] |= {"schedule": schedule, "options": options}


def write(path: Path, taken: dict[str, Any]) -> None:
    """Writes a snapshot, in the place of one that is there."""
    checkpoint.write_tensors(path, taken["tensors"], taken["header"])


def numbered(step: int) -> str:
    """How a snapshot is called where several processes write one each: an older one stays until all have written theirs."""
    return f"snapshot-{step:09d}.safetensors"


def found_in(folders: Sequence[Path]) -> list[Path]:
    """The newest snapshot that lies in every folder whole, one a folder; none where there is none."""
    if len(folders) == 1 and (folders[0] / NAME).exists():
        return [folders[0] / NAME]
    every = [{path.name for path in folder.glob("snapshot-*.safetensors")} for folder in folders]
    common = set.intersection(*every)
    return [folder / max(common) for folder in folders] if common else []


def drop_before(folder: Path, step: int) -> None:
    """Removes a process's snapshots that are older than one that all have written."""
    for path in folder.glob("snapshot-*.safetensors"):
        if path.name < numbered(step):
            path.unlink(missing_ok=True)


def restore(
    paths: Sequence[Path], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scheduler: Any, rank: int = 0
) -> dict[str, Any]:
    """Puts model, optimizers, schedule and random state back; returns the snapshot's header (``step``, ``rows``).

    Args:
        paths: the snapshot of every process that wrote one; ``rank``: of this one, which need not be one of them.

    Raises:
        ArtifactError: there is no snapshot, or it is another model's.
    """
    header = checkpoint.read_header(paths[0], "snapshot")
    own, parameters = model.state_dict(), dict(model.named_parameters())
    owners = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    groups = [group for one in optimizers for group in one.param_groups]
    if len(groups) != len(header["options"]):
        raise ArtifactError(f"{paths[0]}: has {len(header['options'])} parameter groups, the optimizers {len(groups)}")
    for one in optimizers:
        one.state.clear()
    random: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for writer, path in enumerate(paths):
        places = checkpoint.read_header(path, "snapshot").get("places", {})
        for key, tensor in checkpoint.read_tensors(path).items():
            kind, _, name = key.partition("|")
            if kind == "random":
                if writer == rank or len(paths) == 1:
                    random[key] = tensor
            elif kind == "model":
                if name not in own or tuple(own[name].shape) != _whole_shape(tensor, places.get(key)):
                    raise ArtifactError(f"{path}: {name} {tuple(tensor.shape)} does not fit the model")
                if key in places or is_spread(own[name]):
                    put_rows(own[name], tensor, places.get(key))
                else:
                    plain[name] = tensor
            else:
                name, entry = name.rsplit("|", 1)
                parameter = parameters[name]
                owner = owners.get(id(parameter))
                if owner is None:
                    raise ArtifactError(f"{path}: {name} is in none of the optimizers, and was when it was written")
                state = owner.state[parameter]
                if _whole_shape(tensor, places.get(key)) == tuple(parameter.shape) and tensor.dim():
                    if entry not in state:
                        state[entry] = torch.empty_like(parameter, dtype=tensor.dtype).detach()
                    put_rows(state[entry], tensor, places.get(key))
                else:
                    where = torch.device("cpu") if entry == "step" and not _capturable(owner) else parameter.device
                    state[entry] = tensor.to(where)
    if plain:
        model.load_state_dict(plain, strict=False)
    for group, options in zip(groups, header["options"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    schedules = header["schedule"] or []
    for one, state in zip(_several(scheduler), schedules if isinstance(schedules, list) else [schedules], strict=False):
        one.load_state_dict({**one.state_dict(), **state})
    for kind, put in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        own_file = rank == 0 or len(paths) > 1
        if (found := random.get(f"random|{kind}" if own_file else f"random|{kind}|{rank}")) is not None:
            put(found)
    return header


def _whole_shape(tensor: Tensor, place: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(tensor.shape) if place is None else (place[1], *tensor.shape[1:])


@torch.no_grad()
def put_rows(target: Tensor, rows: Tensor, place: Sequence[int] | None) -> None:
    """Copies ``rows`` into the rows of ``target`` that this process holds; ``place``: number of the first one, and of all."""
    if not is_spread(target):
        target[place[0] : place[0] + len(rows)].copy_(rows) if place is not None else target.copy_(rows)
        return
    (begin, count), own = held_rows(target), local(target)
    first = 0 if place is None else place[0]
    low, high = max(begin, first), min(begin + count, first + len(rows))
    if low < high:
        own[low - begin : high - begin].copy_(rows[low - first : high - first])


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
