"""Where on a recording a model stands that a loop has put back from a checkpoint of its own."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.errors import ArtifactError, UsageError
from prunekit.trajectory.proof import FIXED
from prunekit.trajectory.trajectory import Trajectory
from prunekit.trajectory.watch import Watch


def position(folder: Path, model: nn.Module, taken: int) -> dict[str, Any]:
    """The last recorded state at or before step ``taken`` that is the model's to the bit, as a snapshot's header tells of it.

    A loop can count more steps than were recorded, since it counts those that a GradScaler skipped; never fewer.

    Returns:
        ``step``: optimizer steps up to there; ``lines`` of the log; ``rows`` by stream.

    Raises:
        UsageError: half-precision states, which no weights equal to the bit.
        ArtifactError: no recorded state is the model's.
    """
    trajectory = Trajectory(folder)
    if trajectory.header["states"] != "whole":
        raise UsageError(f"{folder}: states are kept as half-precision differences; only whole ones can be gone on with here")
    every, moved = trajectory.header["every"], [0, *accumulate(int(trajectory.step(i).moved) for i in range(len(trajectory)))]
    row = Watch(model, trajectory.layout, folder / FIXED).copy_to(
        np.empty(trajectory.layout.total, trajectory.state(0).numpy().dtype)
    )
    present = torch.from_numpy(row)
    kept = sorted(trajectory.kept)
    for number in range(len(kept) - 1, -1, -1):
        lines = kept[number]
        # A state is kept at every k-th step, and where weights were set; the last one's place in the log is its own.
        own = lines == 0 or not trajectory.step(lines - 1).moved or moved[lines] % every == 0
        if own and moved[lines] <= taken and torch.equal(trajectory.state(lines), present):
            rows = {"states": number + 1, "second_moments": moved[lines], "random": trajectory.forwards(lines)}
            return {"step": moved[lines], "lines": lines, "rows": rows}
    raise ArtifactError(
        f"{folder}: no recorded state up to step {taken} is the model's (of {moved[-1]} steps every {every}. was kept); the "
        "checkpoint is another training's, or lies between kept states: save it at kept steps, or record into another folder"
    )
