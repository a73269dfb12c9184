"""Recording a path of which the states are known and not what moved them: the polygon through them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError, NonFiniteError, UsageError
from prunekit.trajectory.bare import bare, named_tensors
from prunekit.trajectory.layout import Layout, fixed_state, path_dtype
from prunekit.trajectory.proof import ENDED, FIXED, LOG, seal
from prunekit.trajectory.states import WholeWriter
from prunekit.trajectory.store import NAMES
from prunekit.trajectory.writer import no_room
from prunekit.version import __version__

SCHEMA = 1


class Polygon:
    """Writes the states that a model goes through, from the present one, as a trajectory without an optimizer.

    Between two kept states the path is taken as straight, and the whole move counts as the data's share. Where an optimizer
    moves the model's own parameters, record it with ``Recorder``, which knows more of the path.

    One state is held in memory, ``4 P`` bytes (``8 P`` for float64 models), and written before the model goes on.

    Args:
        folder: where the trajectory goes; it must not hold one yet.
        model: in its wrappers or without.
        provenance: facts to keep with the trajectory; JSON values.
        every: k keeps the state of every k-th step only, and the last.
        layout: the coordinates; those that the model has now, frozen later or not, where None.

    Raises:
        UsageError: ``every`` is below 1.
        ArtifactError: the folder already holds a trajectory, or the disk is full; the steps so far stay readable.
        NonFiniteError: a state holds NaN or Inf.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory
        >>> from prunekit.trajectory import Polygon
        >>> model = torch.nn.Linear(2, 2)
        >>> with Polygon(getfixture("tmp_path") / "path", model) as polygon:
        ...     for _ in range(3):
        ...         model.weight.data *= 0.9
        ...         polygon.step()
        >>> len(Trajectory(getfixture("tmp_path") / "path"))
        3
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        provenance: Mapping[str, Any] | None = None,
        *,
        every: int = 1,
        layout: Layout | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"record: every is {every}; it must be 1 or more")
        self.folder, self.model, self.every = folder, bare(model), every
        self.steps = 0
        self._provenance = dict(provenance or {})
        self._layout = Layout.of(self.model) if layout is None else layout
        self._dtype = np.dtype(np.float64 if path_dtype(self.model) == torch.float64 else np.float32)
        self._lines, self._kept = 0, True

    def __enter__(self) -> Polygon:
        if (self.folder / "trajectory.json").exists():
            raise ArtifactError(f"{self.folder}: already holds a trajectory; choose another folder or remove it")
        self._started = time.perf_counter()
        with self._room():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._states = WholeWriter(self.folder, self._layout.total, self._dtype)
            self._states.append(self._present())
            fixed, _ = checkpoint.unique_state(fixed_state(self.model, self._layout))
            checkpoint.write_tensors(self.folder / FIXED, fixed, {"kind": "fixed"})
            self._log = (self.folder / LOG).open("w")
            self._write_header({"complete": False})
        return self

    def step(self) -> None:
        """Takes in that the model went one step on."""
        self.steps += 1
        self._kept = self.steps % self.every == 0
        with self._room():
            if self._kept:
                self._states.append(self._present())
            self._line({} if self._kept else {"state": False})

    @contextmanager
    def jump(self) -> Iterator[None]:
        """As ``Recorder.jump``: around code that sets the model's weights, one piece that is not the data's."""
        before = self._present()
        yield
        after = self._present()
        if np.array_equal(before, after):
            return
        line: dict[str, Any] = {"moved": False}
        with self._room():
            if not self._kept:
                self._states.append(before)
                line["before"] = True  # the state that the last step left lies before this one
            self._states.append(after)
            self._line(line)
        self._kept = True

    def flush(self) -> None:
        """Everything so far is on disk already, where a ``Trajectory`` can read it."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._log.close()
        if kind is not None:
            with contextlib.suppress(OSError):  # what the loop failed with is raised; the path opens up to its last whole step
                self._states.finish()
            return
        with self._room():
            if not self._kept:
                self._states.append(self._present())
            finished = self._states.finish()
            self._write_ended()
            self._write_header(
                {
                    "complete": True,
                    "steps": self._lines,
                    "last_state": not self._kept,
                    "hash": finished.hash,
                    "files": seal(self.folder, finished),
                    "cost": {"seconds": round(time.perf_counter() - self._started, 3)},
                }
            )

    def _present(self) -> np.ndarray[Any, Any]:
        """The model's state, ``(P,)``.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        row = np.empty(self._layout.total, self._dtype)
        self._layout.flatten(named_tensors(self.model), out=torch.from_numpy(row))
        if not np.isfinite(row).all():
            bad = next(e.name for e in self._layout if not np.isfinite(row[e.span]).all())
            raise NonFiniteError(f"step {self.steps}: {bad} became NaN or Inf; the trajectory ends before it")
        return row

    def _line(self, line: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(line) + "\n")  # the line makes the step whole: it comes last
        self._log.flush()
        self._lines += 1

    def _write_ended(self) -> None:
        """Writes what lies beside the path and is another than in the beginning."""
        before = checkpoint.read_tensors(self.folder / FIXED)
        now = fixed_state(self.model, self._layout)
        moved = {name: now[name] for name, tensor in before.items() if not torch.equal(now[name].cpu(), tensor)}
        if moved:
            checkpoint.write_tensors(self.folder / ENDED, moved, {"kind": "ended"})

    def _write_header(self, ended: Mapping[str, Any]) -> None:
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "trajectory",
            "layout": self._layout.to_json(),
            "dtype": NAMES[self._dtype],
            "states": "whole",
            "every": self.every,
            "second_moments": False,
            "random": False,
            "optimizer": None,
            "provenance": {"prunekit": __version__, "torch": torch.__version__, **self._provenance},
        }
        checkpoint.write_json(self.folder / "trajectory.json", facts | dict(ended))

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise no_room(self.folder, self.steps, error) from error
