"""Making a trajectory of checkpoints that someone else saved: the polygon through them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError, NonFiniteError
from prunekit.trajectory.bare import bare
from prunekit.trajectory.layout import Layout, fixed_state, named_tensors, path_dtype
from prunekit.trajectory.recorder import SCHEMA
from prunekit.trajectory.states import WholeWriter
from prunekit.trajectory.store import NAMES
from prunekit.version import __version__


def write_checkpoints(
    folder: Path, model: nn.Module, weights: Sequence[Path], provenance: Mapping[str, Any] | None = None
) -> None:
    """Writes the states in ``weights`` (safetensors, in training order) as a trajectory under ``folder``.

    Between two checkpoints the path is taken as straight, and the whole move counts as the data's share. The model
    is left with the last checkpoint's weights.

    Raises:
        ArtifactError: a file is not safetensors or does not fit the model; the message names the parameter.
        NonFiniteError: a checkpoint holds NaN or Inf.
    """
    model = bare(model)
    layout = Layout.of(model)
    dtype = np.dtype(np.float64 if path_dtype(model) == torch.float64 else np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    writer = WholeWriter(folder, layout.total, dtype)
    for path in weights:
        load_into(model, checkpoint.read_tensors(path), path)
        row = np.empty(layout.total, dtype)
        layout.flatten(named_tensors(model), out=torch.from_numpy(row))
        if not np.isfinite(row).all():
            raise NonFiniteError(f"{path}: holds NaN or Inf")
        writer.append(row)
    fixed, _ = checkpoint.unique_state(fixed_state(model, layout))
    checkpoint.write_tensors(folder / "fixed.safetensors", fixed, {"kind": "fixed"})
    (folder / "steps.jsonl").write_text("".join(json.dumps({}) + "\n" for _ in weights[1:]))
    checkpoint.write_json(
        folder / "trajectory.json",
        {
            "schema": SCHEMA,
            "kind": "trajectory",
            "complete": True,
            "layout": layout.to_json(),
            "dtype": NAMES[dtype],
            "states": "whole",
            "every": 1,
            "second_moments": False,
            "random": False,
            "optimizer": None,
            "provenance": {"prunekit": __version__, "torch": torch.__version__, **(provenance or {})},
            "steps": len(weights) - 1,
            "hash": writer.finish(),
            "cost": {"seconds": 0.0},
        },
    )


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Loads ``state`` into ``model``; names of tied parameters may be missing, anything else may not.

    Raises:
        ArtifactError: names the first missing, unexpected or misshapen tensor.
    """
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ArtifactError(f"{source}: has {name}, which the model does not")
        if own[name].shape != tensor.shape:
            raise ArtifactError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    kept, aliases = checkpoint.unique_state(own)
    for name in kept:
        tied = [alias for alias, target in aliases.items() if target == name]
        if name not in state and not any(alias in state for alias in tied):
            raise ArtifactError(f"{source}: lacks {name}, which the model has")
    model.load_state_dict(state, strict=False)
