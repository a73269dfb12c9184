"""Leaving a trajectory behind: two lines in any training loop, written in the background."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunekit import checkpoint
from prunekit.errors import ArtifactError, PrunekitError
from prunekit.trajectory import snapshot
from prunekit.trajectory.bare import bare, bare_optimizers, named_tensors
from prunekit.trajectory.describe import describe_optimizers, flat_second_moments, group_options, skipped
from prunekit.trajectory.layout import Layout, fixed_state, path_dtype, refuse_meta
from prunekit.trajectory.loaders import Loaders, WatchedLoader
from prunekit.trajectory.members import Members
from prunekit.trajectory.notes import Notes
from prunekit.trajectory.position import position
from prunekit.trajectory.proof import ENDED, FIXED, START, going_on, seal
from prunekit.trajectory.store import NAMES
from prunekit.trajectory.watch import Watch
from prunekit.trajectory.writer import BackgroundWriter, no_room
from prunekit.version import __version__

SCHEMA = 1


class Recorder:
    """Records every optimizer step of ``model`` under ``folder``.

    Args:
        folder: where the trajectory goes; it must not hold one yet (``resume`` goes on with one).
        model: the model being trained, in its wrappers (DDP, torch.compile) or without; its floating-point buffers are recorded
            as well.
        optimizer: any ``torch.optim.Optimizer``, also in a wrapper of accelerate's or Lightning's, or a list of several: a step
            of any of them is a step of the path. Its post-step hook triggers the recording, so learning rates are the ones the
            step used, and steps that a GradScaler skips are not recorded, fused optimizers' neither.
        provenance: facts to keep with the trajectory (recipe, seeds); JSON values.
        every: k keeps the state of every k-th step only; rates and batches are kept of all.
        states: ``"whole"``, or ``"half"`` for half-precision differences: half the disk, see docs/kernel.md.
        second_moments: also keep Adam's ``v`` after each step, which data-wise scores and coupled decay need.
        scheduler: kept in the snapshots, for ``resume``; a list of several is one.
        snapshot_every: steps between two snapshots of what the next step depends on; 0 for none.

    Iterate over :meth:`watch` of a DataLoader, or call :meth:`batch` with the indices of the samples that the coming step sees.
    States cost ``4 P`` bytes a step on disk (``8 P`` for float64 models), P the number of coordinates; second moments
    as much again; a snapshot (one at a time) about ``12 P`` for Adam. A copy of the weights is kept in memory: weights that
    something else sets between two steps (averages that are swapped in, an optimizer that is not recorded) are noticed, and
    become a piece of the path that is neither the gradients' nor the decay's, with a warning.

    Raises:
        UsageError: an optimizer holds parameters that are not the model's, or trains one that was frozen when recording began.
        ArtifactError: the folder already holds a trajectory, or the disk is full; the steps so far stay readable.
        NonFiniteError: a weight became NaN or Inf.

    Example:
        >>> import torch
        >>> from prunekit import Recorder, Trajectory
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> y = x[:, 0].gt(0).long()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> with Recorder(getfixture("tmp_path") / "trajectory", model, optimizer) as recorder:
        ...     for indices in torch.arange(64).split(16):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        ...         recorder.batch(indices)
        ...         optimizer.step()
        >>> len(Trajectory(getfixture("tmp_path") / "trajectory"))
        4
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        provenance: Mapping[str, Any] | None = None,
        *,
        every: int = 1,
        states: Literal["whole", "half"] = "whole",
        second_moments: bool = False,
        scheduler: Any = None,
        snapshot_every: int = 100,
    ) -> None:
        if every < 1:
            raise PrunekitError(f"Recorder: every is {every}; it must be 1 or more")
        self.folder, self.model, self.scheduler = Path(folder), bare(model), scheduler
        self.optimizers = bare_optimizers(optimizer)
        self._called = model  # a wrapper is what the loop calls, and compiled code does not run hooks added later
        self.provenance = dict(provenance or {})
        self.every, self.kind, self.second_moments, self.snapshot_every = every, states, second_moments, snapshot_every
        refuse_meta(self.model)
        self.layout = Layout.of(self.model)
        self.steps = 0
        """Steps recorded so far; where a resumed loop goes on."""
        self.aside: dict[str, Any] = {}
        """A loop's own figures, JSON values: snapshots keep them, ``resume`` brings them back."""
        self._notes = Notes([p for p in self.model.parameters() if p.requires_grad])
        self._lines = 0
        self._resumed: dict[str, Any] | None = None
        self._snapshot: dict[str, Any] | None = None
        self._kept_last = True
        self._averaged = self._warned = False
        self._loaders = Loaders(self._notes.watched)

    @property
    def resumed(self) -> bool:
        """Whether it goes on with a recording that was cut off."""
        return self._resumed is not None

    # -- what a training loop calls ---------------------------------------------------------------------------

    def batch(self, indices: Sequence[int] | Tensor, seed: int | None = None, weight: float | None = None) -> None:
        """Notes which samples the coming step sees; once per micro-batch under gradient accumulation.

        Args:
            indices: of the training samples, in the order of the batch.
            seed: what random augmentation was drawn from, if any, so that the batch can be made again.
            weight: factor on this micro-batch's mean loss in the gradient; by default 1 / (micro-batches of the step).
        """
        self._notes.batch(indices, seed, weight)

    def watch(self, loader: DataLoader[Any]) -> WatchedLoader:
        """The loader, to iterate over: the samples of each batch are noted for the coming step, as by ``batch``.

        Any map-style data set, sampler and workers will do; of a DistributedSampler what every process sees is noted. The next
        gradient must be of the batch that came out last; a batch without a gradient counts as skipped.
        """
        return self._loaders.watched(loader)

    def without_samples(self) -> None:
        """Steps come without samples, as whoever trains knows: nothing more is said of it."""
        self._notes.told = True

    def gradient_scale(self, factor: float | Tensor) -> None:
        """Notes the factor that clipping put on the coming step's gradient: ``min(1, max_norm / (norm + 1e-6))``."""
        self._notes.line["gradient_scale"] = float(factor)

    def skip(self) -> None:
        """Drops what was noted for a step that was not taken; harmless after one that was.

        What a GradScaler skips is noticed without it.
        """
        self._notes.drop()

    def average(self, state: Mapping[str, Tensor]) -> None:
        """Adds averaged weights (EMA, SWA) as the path's last piece; call it after the last step.

        Args:
            state: by parameter name; names that are missing keep their last value.
        """
        own = named_tensors(self.model)
        with torch.no_grad():
            row = self._writer.row()
            self.layout.flatten({**own, **{k: v for k, v in state.items() if k in own}}, out=torch.from_numpy(row))
        self._set(row, lambda buffer: self._watch.copy_to(buffer))
        self._averaged = True

    @contextmanager
    def jump(self) -> Iterator[None]:
        """Around code that sets the model's weights between two steps (prunes them): one straight piece of the path that

        is neither the gradients' nor the decay's. Nothing is added when nothing changes.
        """
        before = self._watch.copy_to(np.empty(self.layout.total, self._dtype))
        yield
        row = self._watch.copy_to(np.empty(self.layout.total, self._dtype))
        if np.array_equal(before, row):
            return
        buffer = self._writer.row()
        buffer[:] = row

        def left(buffer: np.ndarray[Any, Any]) -> None:
            buffer[:] = before

        self._set(buffer, left)
        self._watch.keep()

    def flush(self) -> None:
        """Waits until everything so far is on disk, where a ``Trajectory`` can read it while recording goes on."""
        self._writer.flush()

    def _set(self, row: np.ndarray[Any, Any], left: Callable[[np.ndarray[Any, Any]], object]) -> None:
        """Queues ``row`` as a state that was set; ``left`` fills in the state before it, where that was not kept."""
        line: dict[str, Any] = {"moved": False}
        if not self._kept_last:
            buffer = self._writer.row()
            left(buffer)
            self._writer.put(buffer, None)
            line["before"] = True  # the state that the last step left lies before this one
        self._kept_last = True
        self._writer.put(row, line)
        self._lines += 1

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Any = None,
        *,
        taken: int | None = None,
    ) -> Recorder:
        """A recorder that goes on where the last snapshot of an interrupted recording was taken.

        Model, optimizer, scheduler and torch's random state are put back; ``steps`` says how many steps are done. Recorded
        steps after the snapshot are dropped, to be taken again.

        Args:
            taken: the loop has put everything back itself, from a checkpoint after this many of its steps. The recording, also
                one that was complete, goes on at the state that the model's weights equal; nothing is put back.

        Raises:
            ArtifactError: no trajectory or no snapshot there, it is complete, or it is another model's.
        """
        header = going_on(Path(folder), complete=taken is not None)
        Layout.from_json(header["layout"]).check(model)
        recorder = cls(
            folder, model, optimizer, header["provenance"], every=header["every"], states=header["states"],
            second_moments=header["second_moments"], scheduler=scheduler, snapshot_every=header["snapshot_every"],
        )  # fmt: skip
        recorder._header = header
        if taken is None:
            recorder._resumed = snapshot.restore(recorder.folder, recorder.model, recorder.optimizers, scheduler)
        else:
            recorder._resumed = position(recorder.folder, recorder.model, taken)
        recorder.steps = int(recorder._resumed["step"])
        recorder.aside = recorder._resumed.get("aside", {})
        recorder._lines = int(recorder._resumed.get("lines", recorder.steps))
        return recorder

    # -- entering and leaving ----------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if self._resumed is None and (self.folder / "trajectory.json").exists():
            raise ArtifactError(f"{self.folder}: already holds a trajectory; choose another folder or remove it")
        self._started = time.perf_counter()
        self._dtype = dtype = np.dtype(np.float64 if path_dtype(self.model) == torch.float64 else np.float32)
        replay = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.model.modules())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._resumed is None:
                self._begin(dtype, replay)
            else:  # it is not complete any more, before anything of it is dropped
                checkpoint.write_json(self.folder / "trajectory.json", self._header)
                (self.folder / ENDED).unlink(missing_ok=True)
            rows = self._resumed["rows"] if self._resumed else {}
            streams = {"second_moments": self.second_moments, "random": replay}
            self._watch = Watch(self.model, self.layout, self.folder / FIXED)
            self._writer = BackgroundWriter(self.folder, self.layout, dtype, self.kind, streams, rows, self._lines)
            if self._resumed is None:
                self._writer.start_with(self._watch.copy_to(self._writer.row()))
                checkpoint.write_json(self.folder / "trajectory.json", self._header)
        except OSError as error:
            raise no_room(self.folder, 0, error) from error
        self._watch.keep()
        self._members = Members(self.model, self.layout, self.optimizers, self._header["optimizer"])
        self._hooks = [
            hook
            for one in self.optimizers
            for hook in (one.register_step_pre_hook(self._before_step), one.register_step_post_hook(self._after_step))
        ]
        if replay:
            self._hooks.append(self._called.register_forward_pre_hook(self._before_forward))
        self._notes.watch()
        if self.snapshot_every and self._resumed is None:
            self._take_snapshot()
            self._write_snapshot()
        return self

    def _begin(self, dtype: np.dtype[Any], replay: bool) -> None:
        fixed, _ = checkpoint.unique_state(fixed_state(self.model, self.layout))
        checkpoint.write_tensors(self.folder / FIXED, fixed, {"kind": "fixed"})
        start = snapshot.optimizer_tensors(self.model, self.optimizers)
        checkpoint.write_tensors(self.folder / START, start, {"kind": "start"})
        self._header: dict[str, Any] = {
            "schema": SCHEMA, "kind": "trajectory", "complete": False, "layout": self.layout.to_json(), "dtype": NAMES[dtype],
            "states": self.kind, "every": self.every, "second_moments": self.second_moments, "random": replay,
            "snapshot_every": self.snapshot_every,
            "optimizer": describe_optimizers(self.model, self.optimizers),
            "provenance": {"prunekit": __version__, "torch": torch.__version__, **self.provenance},
        }  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._notes.close()
        failure: PrunekitError | None = None
        ended: dict[str, Tensor] = {}
        try:
            if kind is None:
                self._watch.look_again()
                self._watch.check_frozen()
                ended = self._watch.end_of_fixed()
                if not self._averaged and self._watch.moved(buffers=True):
                    self._set(self._watch.copy_to(self._writer.row()), self._watch.copy_kept)
            if not self._kept_last:
                self._writer.put(self._watch.copy_kept(self._writer.row()), None)
        except PrunekitError as problem:
            failure = problem
        written = self._writer.close()
        if written is None:
            try:
                if ended:
                    checkpoint.write_tensors(self.folder / ENDED, ended, {"kind": "ended"})
                cost = {"seconds": round(time.perf_counter() - self._started, 3)}
                checkpoint.write_json(
                    self.folder / "trajectory.json",
                    {
                        **self._header,
                        "complete": kind is None and failure is None,
                        "steps": self._writer.lines,
                        "last_state": not self._kept_last,
                        "hash": self._writer.finished.hash,
                        "files": seal(self.folder, self._writer.finished),
                        "cost": cost,
                    },
                )
                if kind is None and failure is None:
                    (self.folder / snapshot.NAME).unlink(missing_ok=True)
            except OSError as problem:
                written = no_room(self.folder, self.steps, problem)
        if kind is None and (written or failure) is not None:
            raise written or failure  # type: ignore[misc]

    # -- hooks -------------------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self._notes.random.append(torch.get_rng_state())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._members.changed:
            self._members.add_groups()
            checkpoint.write_json(self.folder / "trajectory.json", self._header)
        self._watch.check_step(optimizer)
        if moved := self._watch.moved():
            self._set(self._watch.copy_to(self._writer.row()), self._watch.copy_kept)
            if not self._warned:
                named = ", ".join(moved[:3]) + (" and others" if len(moved) > 3 else "")
                warnings.warn(
                    f"Recorder: {named} moved between two steps; the path has this as weights that were set, by no sample. If "
                    "another optimizer trains them, record both: Recorder(folder, model, [first, second])",
                    stacklevel=2,
                )
                self._warned = True
        if self._snapshot is not None:
            self._write_snapshot()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        number = next(i for i, one in enumerate(self.optimizers) if one is optimizer)
        line, random, behind = self._notes.of_step(number, self._lines)
        if skipped(optimizer):
            return
        line["groups"] = [
            {k: v for k, v in group_options(group).items() if k == "lr" or start.get(k) != v}
            for group, start in zip(optimizer.param_groups, self._members.groups[number], strict=True)
        ]
        if missing := [name for name, parameter in self._members.stepped[number] if parameter.grad is None]:
            line["without_gradient"] = missing
        line |= {"optimizer": number} if len(self.optimizers) > 1 else {}
        line |= {"behind": behind} if behind else {}
        self.steps += 1
        self._kept_last = self.steps % self.every == 0
        if not self._kept_last:
            line["state"] = False
        row = self._watch.copy_to(self._writer.row()) if self._kept_last else None
        self._watch.keep()
        moments = self._writer.row() if self.second_moments else None
        if moments is not None:
            flat_second_moments(self.model, optimizer, self.layout.parameters, torch.from_numpy(moments))
        if random:
            line["random"] = len(random)
        self._writer.put(row, line, moments, [r.numpy() for r in random])
        self._lines += 1
        if self.snapshot_every and self.steps % self.snapshot_every == 0:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        self._snapshot = snapshot.take(self.steps, self._lines, self.model, self.optimizers, self._writer.queued)

    def _write_snapshot(self) -> None:
        assert self._snapshot is not None
        snapshot.add_schedule(self._snapshot, self.optimizers, self.scheduler)
        self._snapshot["header"]["aside"] = json.loads(json.dumps(self.aside))  # as it is now, not when it is written
        self._writer.put_snapshot(self._snapshot)
        self._snapshot = None
