"""Where a recording goes on: at its last snapshot, or where a model stands that a loop has put back from its own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.errors import ArtifactError, UsageError
from prunekit.trajectory import snapshot
from prunekit.trajectory.parts import parts_of
from prunekit.trajectory.proof import FIXED
from prunekit.trajectory.shards import Share
from prunekit.trajectory.together import Together
from prunekit.trajectory.trajectory import Trajectory
from prunekit.trajectory.watch import Watch


def restored(
    folder: Path,
    model: nn.Module,
    share: Share,
    ranks: Together,
    header: Mapping[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
    scheduler: Any,
) -> dict[str, Any]:
    """Puts everything back as the last snapshot has it that all processes wrote; returns its header.

    Raises:
        ArtifactError: there is none, or it is another model's.
    """

    def restore() -> dict[str, Any]:
        parts = parts_of(folder, header, share.whole)
        paths = next((found for part in reversed(parts) if (found := snapshot.found_in(part.local))), None)
        if paths is None:
            raise ArtifactError(f"{folder}: no snapshot there that all its processes wrote; nothing to resume from")
        return snapshot.restore(paths, model, optimizers, scheduler, ranks.rank)

    return dict(ranks.exchange(restore)[0])


def position(folder: Path, model: nn.Module, share: Share, ranks: Together, taken: int) -> dict[str, Any]:
    """The last recorded state at or before step ``taken`` that is the model's to the bit in every process; see ``positions``.

    Raises:
        ArtifactError: there is none.
    """
    own = ranks.exchange(lambda: positions(folder, model, taken, share) if share.writes else None)
    common = [one for one in own[0] if all(other is None or one in other for other in own)]
    if not common:
        raise ArtifactError(
            f"{folder}: no recorded state up to step {taken} is the model's; the checkpoint is another training's, or lies "
            "between kept states: save it at kept steps, or record into another folder"
        )
    return dict(common[0])


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
