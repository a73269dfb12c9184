"""The recorder's other half: a thread that writes rows and log lines in the order they happened."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit import durable
from prunekit.errors import ArtifactError, NonFiniteError, PrunekitError
from prunekit.trajectory.layout import Layout, path_dtype
from prunekit.trajectory.states import BASE_EVERY, WRITERS
from prunekit.trajectory.store import Finished, RowWriter, joined

BUFFERS = 12
Row = np.ndarray[Any, Any]


class BackgroundWriter:
    """Takes rows from the training thread and gives their buffers back once they are on disk.

    Args:
        folder: of the rows; ``log``: the step log that it adds to.
        streams: which further rows a step brings (``second_moments``, ``random``).
        rows: rows by stream that are there already (a resumed recording); ``lines``: log lines that are.
        before: steps that lie in earlier parts, and in another log.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        layout: Layout,
        dtype: np.dtype[Any],
        kind: str,
        streams: Mapping[str, bool],
        rows: Mapping[str, int],
        lines: int,
        before: int = 0,
    ) -> None:
        self.folder, self.layout, self._log_path = folder, layout, log
        self.lines = before + lines
        self.finished = Finished("", {})
        self._counts = {name: rows.get(name, 0) for name in ("states", "second_moments", "random")}
        self._states = WRITERS[kind](folder, layout.total, dtype, rows=self._counts["states"])
        self._extra: dict[str, RowWriter] = {}
        if streams["second_moments"]:
            count = self._counts["second_moments"]
            self._extra["second_moments"] = RowWriter(folder, "second_moments", layout.total, dtype, rows=count)
        if streams["random"]:
            size = torch.get_rng_state().numel()
            self._extra["random"] = RowWriter(folder, "random", size, np.dtype(np.uint8), rows=self._counts["random"])
        self._log = _open_log(log, lines)
        self._failure: PrunekitError | None = None
        self._free: queue.SimpleQueue[Row] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(np.empty(layout.total, dtype))
        self._pending: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="prunekit-recorder", daemon=True)
        self._thread.start()

    def row(self) -> Row:
        """A free buffer, ``(P,)``; waits while all are still to be written.

        Raises:
            ArtifactError: writing has failed (full disk).
            NonFiniteError: a weight became NaN or Inf.
        """
        if self._failure is not None:
            raise self._failure
        buffer = self._free.get()
        if self._failure is not None:
            raise self._failure
        return buffer

    def start_with(self, row: Row) -> None:
        """Writes the first state at once."""
        self._states.append(row)
        self._counts["states"] += 1
        self._free.put(row)

    def put(self, row: Row | None, line: dict[str, Any] | None, moments: Row | None = None, random: Sequence[Row] = ()) -> None:
        """Queues a step: its state (or None), its log line (None for a state without a step), further rows."""
        if self._failure is not None:
            raise self._failure
        self._counts["states"] += row is not None
        self._counts["second_moments"] += moments is not None
        self._counts["random"] += len(random)

        def write() -> None:
            try:
                if row is not None:
                    self._check(row)
                    self._states.append(row)
                if moments is not None:
                    self._extra["second_moments"].append(moments)
                for state in random:
                    self._extra["random"].append(state)
                if line is not None:
                    durable.on_operation("write", self._log_path)
                    self._log.write(json.dumps(line) + "\n")  # the line makes the step whole: it comes last
                    self._log.flush()
                    self.lines += 1
            finally:
                for buffer in (row, moments):
                    if buffer is not None:
                        self._free.put(buffer)

        self._pending.put(write)

    @property
    def queued(self) -> dict[str, int]:
        """Rows by stream, those still to be written included."""
        return dict(self._counts)

    def put_snapshot(self, write: Callable[[], None]) -> None:
        """Queues the writing of a snapshot; the rows that it counts are queued before it, so they are there when it is."""
        self._pending.put(write)

    def flush(self) -> None:
        """Waits until what is queued is written; raises what went wrong, if anything did."""
        done = threading.Event()
        self._pending.put(done.set)
        while not done.wait(0.1):
            if self._failure is not None:  # a failed writer drops what is queued
                break
        if self._failure is not None:
            raise self._failure

    def close(self) -> PrunekitError | None:
        """Writes what is queued and trims the files; returns what went wrong, if anything did."""
        self._pending.put(None)
        self._thread.join()
        if self._failure is None:
            try:
                self.finished = joined([self._states.finish(), *(w.finish() for w in self._extra.values())])
            except OSError as error:
                self._failure = no_room(self.folder, self.lines, error)
        with contextlib.suppress(OSError):  # a full disk has been told of above
            self._log.close()
        return self._failure

    def _check(self, row: Row) -> None:
        if not np.isfinite(row).all():
            bad = next(e.name for e in self.layout if not np.isfinite(row[e.span]).all())
            raise NonFiniteError(f"step {self.lines}: {bad} became NaN or Inf; the trajectory ends before it")

    def _work(self) -> None:
        while (job := self._pending.get()) is not None:
            if self._failure is not None:
                self._free.put(np.empty(0))  # whoever waits for a buffer must wake and be told
                continue
            try:
                job()
            except OSError as error:
                self._failure = no_room(self.folder, self.lines, error)
            except PrunekitError as error:
                self._failure = error


def _open_log(path: Path, lines: int) -> Any:
    """The step log, with its first ``lines`` lines kept."""
    if lines == 0:
        return path.open("w")
    with path.open("rb+") as file:
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())
        os.fsync(file.fileno())
    return path.open("a")


def no_room(folder: Path, steps: int, error: OSError) -> ArtifactError:
    """What a full or failing disk means for the recording."""
    free = room_for(folder) / 1e6
    return ArtifactError(
        f"{folder}: recording stopped after {steps} steps ({error.strerror or error}, {free:.0f} MB free); "
        "the steps so far can be read"
    )


def room_for(folder: Path) -> int:
    """Bytes that are free on the disk where a folder is, or will be."""
    here = next((place for place in [folder, *folder.absolute().parents] if place.is_dir()), Path("."))
    return shutil.disk_usage(here).free


def disk_needed(
    model: nn.Module,
    steps: int,
    samples_seen: int,
    every: int = 1,
    states: str = "whole",
    second_moments: bool = False,
    snapshot: bool = True,
) -> int:
    """Bytes that recording ``steps`` steps will take, the step log (8 bytes a sample seen) and a ``snapshot`` included."""
    width = 8 if path_dtype(model) == torch.float64 else 4
    total = Layout.of(model).total
    rows = steps // every + 2
    per_state = total * (2 + width / BASE_EVERY if states == "half" else width)
    moments = total * width * steps if second_moments else 0
    return int(per_state * rows) + moments + 8 * samples_seen + (4 * total * width if snapshot else 0)
