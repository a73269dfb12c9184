"""What one process writes of a recording: rows of its own coordinates, its log, its snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import PrunekitError
from prunekit.trajectory import snapshot
from prunekit.trajectory.bare import local, named_tensors
from prunekit.trajectory.describe import flat_second_moments
from prunekit.trajectory.layout import fixed_state, path_dtype
from prunekit.trajectory.proof import ENDED, FIXED, START, seal
from prunekit.trajectory.shards import Share, is_spread, once, owned_rows, shares
from prunekit.trajectory.watch import Watch
from prunekit.trajectory.writer import BackgroundWriter

Row = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """Where a process goes on writing.

    Attributes:
        folder: of its rows; ``log``: of its steps.
        rows: by stream, rows that lie there; ``lines``: of its log.
        before: steps in earlier parts whose lines are in another log.
        earlier: by stream, rows in earlier parts.
    """

    folder: Path
    log: Path
    rows: Mapping[str, int]
    lines: int
    before: int
    earlier: Mapping[str, int]


class Tape:
    """Opened for writing.

    Args:
        model: as it is recorded, without wrappers.
        share: the coordinates of this process.
        kind: how states become rows, ``"whole"`` or ``"half"``.
        streams: which further rows a step brings (``second_moments``, ``random``).
        fresh: whether nothing of it is there: what lies beside the path is written first.
        taken: steps that stay; snapshots of later ones go.

    Attributes:
        kept_last: whether the last step's state is among the rows.
        snapshots: steps of the snapshots that are on disk whole, oldest first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        share: Share,
        rank: int,
        place: Place,
        kind: str,
        streams: Mapping[str, bool],
        fresh: bool,
        taken: int,
    ) -> None:
        self.model, self.optimizers, self.share, self.rank, self.place = model, optimizers, share, rank, place
        self.dtype = np.dtype(np.float64 if path_dtype(model) == torch.float64 else np.float32)
        self.kept_last, self.snapshots = True, list[int]()
        self._second_moments = streams["second_moments"]
        place.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._write(FIXED, "fixed", once(fixed_state(model, share.whole)))
            self._write(START, "start", snapshot.optimizer_tensors(model, optimizers))
        for path in place.folder.glob("snapshot-*.safetensors"):
            if fresh or path.name > snapshot.numbered(taken):
                path.unlink(missing_ok=True)
        self.watch = Watch(model, share.layout, place.folder / FIXED, share.names)
        self.writer = BackgroundWriter(
            place.folder, place.log, share.layout, self.dtype, kind, streams, place.rows, place.lines, place.before
        )

    def _write(self, name: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        own, places = shares(tensors, self.rank)
        checkpoint.write_tensors(self.place.folder / name, own, {"kind": kind, **({"rows": places} if places else {})})

    def present(self) -> Row:
        """The present state, in a buffer of its own."""
        return self.watch.copy_to(np.empty(self.share.layout.total, self.dtype))

    def step(self, optimizer: torch.optim.Optimizer, line: dict[str, Any], random: Sequence[Tensor], keep: bool) -> None:
        """Queues a step that was just taken; ``keep``: with its state."""
        self.kept_last = keep
        row = self.watch.copy_to(self.writer.row()) if keep else None
        self.watch.keep()
        moments = self.writer.row() if self._second_moments else None
        if moments is not None:
            flat_second_moments(self.model, optimizer, self.share.layout.parameters, torch.from_numpy(moments))
        self.writer.put(row, line, moments, [state.numpy() for state in random])

    def set(self, row: Row | None = None, left: Row | None = None) -> None:
        """Queues a state that was set, the present one by default; ``left``: the one before it, by default what a step left."""
        line: dict[str, Any] = {"moved": False}
        if not self.kept_last:
            buffer = self.writer.row()
            if left is None:
                self.watch.copy_kept(buffer)
            else:
                buffer[:] = left
            self.writer.put(buffer, None)
            line["before"] = True  # the state that the last step left lies before this one
        self.kept_last = True
        buffer = self.writer.row()
        if row is None:
            self.watch.copy_to(buffer)
        else:
            buffer[:] = row
        self.writer.put(buffer, line)

    @torch.no_grad()
    def average(self, state: Mapping[str, Tensor]) -> None:
        """Queues weights that were averaged; of whole tensors its own rows are taken."""
        own = named_tensors(self.model)
        whole: dict[str, Tensor] = {}
        for entry in self.share.layout:
            given = state.get(entry.name, own[entry.name])
            if is_spread(own[entry.name]) and not is_spread(given):
                first, count = owned_rows(own[entry.name], self.rank)
                given = given[first : first + count]
            whole[entry.name] = local(given)
        masks = {name: tensor for name, tensor in own.items() if name not in whole and not is_spread(tensor)}
        row = np.empty(self.share.layout.total, self.dtype)
        self.share.layout.flatten({**masks, **whole}, out=torch.from_numpy(row))
        self.set(row, self.present())

    @property
    def rows(self) -> dict[str, int]:
        """Rows by stream, earlier parts' and those still to be written included."""
        return {name: count + self.place.earlier.get(name, 0) for name, count in self.writer.queued.items()}

    def put_snapshot(self, taken: dict[str, Any]) -> None:
        """Queues the writing of a snapshot; where every process writes one, beside the last."""
        step = int(taken["header"]["step"])
        path = self.place.folder / (snapshot.numbered(step) if self.share.sharded else snapshot.NAME)

        def write() -> None:
            snapshot.write(path, taken)
            self.snapshots.append(step)

        self.writer.put_snapshot(write)

    def drop_snapshots(self, before: int) -> None:
        """Removes those older than one that all processes have."""
        if self.snapshots and self.snapshots[0] < before:
            snapshot.drop_before(self.place.folder, before)
            self.snapshots = [step for step in self.snapshots if step >= before]

    def last(self) -> dict[str, Tensor]:
        """What lies beside the path and is another than in the beginning, when training has ended.

        Raises:
            PrunekitError: a parameter that is not recorded has moved, or a recorded one is gone.
        """
        self.watch.look_again()
        self.watch.check_frozen()
        return self.watch.end_of_fixed()

    def close(self, ended: Mapping[str, Tensor]) -> PrunekitError | dict[str, Any]:
        """Ends all files: what went wrong, or what trajectory.json says of them.

        Raises:
            OSError: the disk is full.
        """
        if (written := self.writer.close()) is not None:
            return written
        if ended:
            own = named_tensors(self.model)
            places = {n: [owned_rows(own[n], self.rank)[0], own[n].shape[0]] for n in ended if is_spread(own[n])}
            header = {"kind": "ended", **({"rows": places} if places else {})}
            checkpoint.write_tensors(self.place.folder / ENDED, ended, header)
        return {
            "steps": self.writer.lines,
            "hash": self.writer.finished.hash,
            "files": seal(self.place.folder, self.writer.finished),
        }

    def remove_snapshots(self) -> None:
        """After a recording that is complete."""
        for path in [self.place.folder / snapshot.NAME, *self.place.folder.glob("snapshot-*.safetensors")]:
            path.unlink(missing_ok=True)
