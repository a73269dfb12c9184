"""Which tensors a checkpoint of the user's holds: one safetensors file, shards, a folder of either, or a named ``.pt``."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import bounded, checkpoint
from prunekit.errors import ArtifactError

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
"""Read by ``torch.load(weights_only=True)`` alone, which runs no code, and only where the user names the file."""
INDEX = ".index.json"
STATES = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Under which keys training programs keep the model's state beside other things."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name.

    Args:
        path: a safetensors file; an index of shards (``model.safetensors.index.json``); a folder that holds one of these; or a
            ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` with a state dict.

    Raises:
        ArtifactError: it is missing, damaged, of another kind, or holds more than tensors; says what to do.
    """
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(INDEX):
        return _shards(path)
    if path.suffix in PICKLED:
        return _pickled(path)
    return checkpoint.read_tensors(path)


def _folder(path: Path) -> dict[str, Tensor]:
    for kind, verb in (("trajectory.json", "score"), ("prunekit.json", "eval")):
        if (path / kind).exists():
            raise ArtifactError(f"{path}: is prunekit's own ({kind}), which `prunekit {verb}` reads; name a model's weights")
    found = sorted(p.name for p in path.iterdir() if p.is_file())
    indices = [name for name in found if name.endswith(".safetensors" + INDEX)]
    files = [name for name in found if name.endswith(".safetensors")]
    for names in (indices, files):
        if len(names) == 1:
            return read_weights(path / names[0])
        if "model.safetensors" in names:
            return read_weights(path / "model.safetensors")
    if indices or files:
        raise ArtifactError(f"{path}: holds {len(indices or files)} of them ({', '.join((indices or files)[:4])}); name one")
    named = [name for name in found if name.endswith(PICKLED) or name.endswith(".bin" + INDEX)]
    if named:
        raise ArtifactError(f"{path}: holds no safetensors file, but {', '.join(named[:4])}; name that file itself")
    raise ArtifactError(f"{path}: a folder without weights; it must hold model.safetensors or {'model.safetensors' + INDEX}")


def _shards(path: Path) -> dict[str, Tensor]:
    try:
        table = bounded.parsed(bounded.text(path, bounded.JSON))["weight_map"]
        shards = {str(name): str(file) for name, file in table.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not an index of shards, which has a weight_map ({error})") from None
    if strange := next((file for file in shards.values() if Path(file).name != file or file.endswith(INDEX)), None):
        raise ArtifactError(f"{path}: names the shard {strange!r}; shards lie beside their index")
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(shards.values()):
        tensors = read_weights(path.parent / file)
        wanted = [name for name, where in shards.items() if where == file]
        if missing := [name for name in wanted if name not in tensors]:
            raise ArtifactError(f"{path.parent / file}: lacks {missing[0]}, which {path.name} says it holds")
        found |= {name: tensors[name] for name in wanted}
    return found


def _pickled(path: Path) -> dict[str, Tensor]:
    bounded.size(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        named = re.search(r"(?:GLOBAL|global) `?([\w.]+\.\w+)", str(error))
        if named or "weights_only" in str(error) or "Weights only" in str(error):
            what = f"an object of {named.group(1)}" if named else "more than tensors"
            raise ArtifactError(
                f"{path}: holds {what}, and prunekit runs no code from files; save the state dict alone: "
                "safetensors.torch.save_file(model.state_dict(), path)"
            ) from None
        raise ArtifactError(f"{path}: torch.load cannot read it ({' '.join(str(error).split())[:120] or 'empty'})") from None
    return _state(found, path)


def _state(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what was read: that itself, or what lies under one of ``STATES``."""
    if not isinstance(found, Mapping):
        raise ArtifactError(f"{path}: holds a {type(found).__name__}, not a state dict (names and tensors)")
    for candidate in (found, *(found[key] for key in STATES if isinstance(found.get(key), Mapping))):
        tensors = {str(name): value for name, value in candidate.items() if isinstance(value, Tensor)}
        rest = [name for name, value in candidate.items() if not isinstance(value, Tensor) and value is not None]
        if tensors and not any(isinstance(candidate[name], Mapping) for name in rest):
            return tensors
    raise ArtifactError(
        f"{path}: no state dict in it, nor under {', '.join(STATES)}; its keys are {', '.join(map(str, list(found)[:6]))}"
    )
