"""Making a trajectory of checkpoints that someone else saved: the polygon through them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import NonFiniteError
from prunekit.trajectory.bare import bare, named_tensors
from prunekit.trajectory.layout import Layout, fixed_state, path_dtype
from prunekit.trajectory.loading import fitted, load_into
from prunekit.trajectory.proof import FIXED, LOG, seal
from prunekit.trajectory.recorder import SCHEMA
from prunekit.trajectory.states import WholeWriter
from prunekit.trajectory.store import NAMES
from prunekit.trajectory.weights import read_weights
from prunekit.version import __version__


def write_checkpoints(
    folder: Path,
    model: nn.Module,
    weights: Sequence[Path | Mapping[str, Tensor]],
    provenance: Mapping[str, Any] | None = None,
    read: Callable[[Path], Mapping[str, Tensor]] = read_weights,
) -> None:
    """Writes the states in ``weights``, files that ``read`` reads or in memory, in training order, as a trajectory.

    Between two checkpoints the path is taken as straight, and the whole move counts as the data's share. The model
    is left with the last checkpoint's weights.

    Raises:
        ArtifactError: a file holds no weights or does not fit the model; the message names the parameter.
        NonFiniteError: a checkpoint holds NaN or Inf.
    """
    model = bare(model)
    layout = Layout.of(model)
    dtype = np.dtype(np.float64 if path_dtype(model) == torch.float64 else np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    writer = WholeWriter(folder, layout.total, dtype)
    for given in weights:
        path, state = (given, read(given)) if isinstance(given, Path) else (Path("a model in memory"), given)
        load_into(model, fitted(state, model), path)
        row = np.empty(layout.total, dtype)
        layout.flatten(named_tensors(model), out=torch.from_numpy(row))
        if not np.isfinite(row).all():
            raise NonFiniteError(f"{path}: holds NaN or Inf")
        writer.append(row)
    fixed, _ = checkpoint.unique_state(fixed_state(model, layout))
    checkpoint.write_tensors(folder / FIXED, fixed, {"kind": "fixed"})
    (folder / LOG).write_text("".join(json.dumps({}) + "\n" for _ in weights[1:]))
    finished = writer.finish()
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
            "hash": finished.hash,
            "files": seal(folder, finished),
            "cost": {"seconds": 0.0},
        },
    )
