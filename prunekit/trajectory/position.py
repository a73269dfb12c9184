"""Where on a recording a model stands that a loop has put back from a checkpoint of its own."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.errors import UsageError
from prunekit.trajectory.proof import FIXED
from prunekit.trajectory.shards import Share
from prunekit.trajectory.trajectory import Trajectory
from prunekit.trajectory.watch import Watch


def positions(folder: Path, model: nn.Module, taken: int, share: Share) -> list[dict[str, Any]]:
    """The recorded states at or before step ``taken`` that are the model's to the bit in this process's share, last one first.

    A snapshot's header tells of each. A loop can count more steps than were recorded, since it counts those that a GradScaler
    skipped; never fewer.

    Returns:
        ``step``: optimizer steps up to there; ``lines`` of the log; ``rows`` by stream.

    Raises:
        UsageError: half-precision states, which no weights equal to the bit.
    """
    trajectory = Trajectory(folder)
    if trajectory.header["states"] != "whole":
        raise UsageError(f"{folder}: states are kept as half-precision differences; only whole ones can be gone on with here")
    every, moved = trajectory.header["every"], [0, *accumulate(int(trajectory.step(i).moved) for i in range(len(trajectory)))]
    dtype = trajectory.state(0).numpy().dtype
    row = Watch(model, share.layout, folder / FIXED, share.names).copy_to(np.empty(share.layout.total, dtype))
    present, found = torch.from_numpy(row), []
    kept = sorted(trajectory.kept)
    for number in range(len(kept) - 1, -1, -1):
        lines = kept[number]
        # A state is kept at every k-th step, and where weights were set; the last one's place in the log is its own.
        own = lines == 0 or not trajectory.step(lines - 1).moved or moved[lines] % every == 0
        if own and moved[lines] <= taken and torch.equal(share.part_of(trajectory.state(lines)), present):
            rows = {"states": number + 1, "second_moments": moved[lines], "random": trajectory.forwards(lines)}
            found.append({"step": moved[lines], "lines": lines, "rows": rows})
            if not share.sharded:
                break
    return found
