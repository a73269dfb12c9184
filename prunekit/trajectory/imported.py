"""Making a trajectory of checkpoints that someone else saved: the polygon through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import NonFiniteError
from prunekit.trajectory.bare import bare, named_tensors
from prunekit.trajectory.layout import Layout
from prunekit.trajectory.loading import fitted, load_into
from prunekit.trajectory.polygon import Polygon
from prunekit.trajectory.weights import read_weights


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

    def take(given: Path | Mapping[str, Tensor]) -> None:
        path, state = (given, read(given)) if isinstance(given, Path) else (Path("a model in memory"), given)
        load_into(model, fitted(state, model), path)
        named = named_tensors(model)
        if not all(bool(torch.isfinite(named[entry.name]).all()) for entry in layout):
            raise NonFiniteError(f"{path}: holds NaN or Inf")

    take(weights[0])
    with Polygon(folder, model, provenance) as polygon:
        for given in weights[1:]:
            take(given)
            polygon.step()
