"""Leaving a trajectory behind: two lines in any training loop, written in the background."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunekit import checkpoint
from prunekit.errors import ArtifactError, Note, PrunekitError, UsageError
from prunekit.remote import Remote, Spool, placed
from prunekit.trajectory.bare import bare, bare_optimizers, reshard
from prunekit.trajectory.course import Course, Options
from prunekit.trajectory.describe import describe_optimizers
from prunekit.trajectory.layout import Layout, path_dtype, refuse_meta
from prunekit.trajectory.loaders import Loaders, WatchedLoader
from prunekit.trajectory.manifest import agree_on, ended, facts_of, go_on_in, place_in, seal_before
from prunekit.trajectory.members import Members
from prunekit.trajectory.notes import Notes
from prunekit.trajectory.parts import part_json
from prunekit.trajectory.position import position, restored
from prunekit.trajectory.proof import ENDED, going_on
from prunekit.trajectory.shards import Share
from prunekit.trajectory.tape import Tape
from prunekit.trajectory.together import Together
from prunekit.trajectory.writer import no_room
from prunekit.version import __version__

SCHEMA = 1


class Recorder:
    """Records every optimizer step of ``model`` under ``folder``.

    Args:
        folder: where the trajectory goes; it must not hold one yet (``resume`` goes on with one). An address for fsspec
            (``s3://bucket/trajectory``): it is recorded in a temporary folder, and goes there when the loop has ended.
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
        alone: this process trains by itself, though others of torch.distributed run beside it; by default where it is a rank of
            a verb (``prunekit.ranks``), whose ranks each keep what they record.

    Where several processes train one model, each of them makes a Recorder, with the same arguments, and it is one recording:
    under DDP the first process writes and the others only tell what they noted; of a model sharded by ``fully_shard`` each
    writes its own rows (docs/loops.md, "Several processes").

    Iterate over :meth:`watch` of a DataLoader, or call :meth:`batch` with the indices of the samples that the coming step sees.
    States cost ``4 P`` bytes a step on disk (``8 P`` for float64 models), P the number of coordinates; second moments
    as much again; a snapshot (one at a time) about ``12 P`` for Adam. A copy of the weights is kept in memory: weights that
    something else sets between two steps (averages that are swapped in, an optimizer that is not recorded) are noticed, and
    become a piece of the path that is neither the gradients' nor the decay's, with a warning.

    Raises:
        UsageError: an optimizer holds parameters that are not the model's, or trains one that was frozen when recording began;
            the processes do not record the same, or spread the model in another way than DDP and ``fully_shard``.
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
        folder: str | Path | Remote,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        provenance: Mapping[str, Any] | None = None,
        *,
        every: int = 1,
        states: Literal["whole", "half"] = "whole",
        second_moments: bool = False,
        scheduler: Any = None,
        snapshot_every: int = 100,
        alone: bool | None = None,
    ) -> None:
        self._ranks = Together(alone)
        self.scheduler = scheduler
        self._called = model  # a wrapper is what the loop calls, and compiled code does not run hooks added later
        self.provenance = dict(provenance or {})
        self.every, self.kind, self.second_moments, self.snapshot_every = every, states, second_moments, snapshot_every
        self._steps = 0
        self._course: Course | None = None
        self.aside: dict[str, Any] = {}
        """A loop's own figures, JSON values: snapshots keep them, ``resume`` brings them back."""
        self._ranks.exchange(lambda: self._prepare(model, optimizer))
        self._spool: Spool | None = None
        if isinstance(place := placed(folder), Remote):
            self._spool = self._spooled(place)
            place = self._spool.folder
        self.folder: Path = place
        self._notes = Notes([p for p in self.model.parameters() if p.requires_grad], model)
        self._notes.told = not self.first
        self._loaders = Loaders(self._notes.watched, self._ranks.size)
        self._resumed: dict[str, Any] | None = None
        self._tape: Tape | None = None
        self._averaged = False

    def _spooled(self, folder: Remote) -> Spool:
        """A folder of this machine whose files go to the store in the end."""
        if self._ranks.size > 1:
            raise UsageError(
                f"{folder}: several processes record into a folder of a file system; copy it to the store in the end"
            )
        return Spool(folder, "trajectory.json")

    def _prepare(self, model: nn.Module, optimizer: Any) -> None:
        if self.every < 1:
            raise PrunekitError(f"Recorder: every is {self.every}; it must be 1 or more")
        self.model, self.optimizers = bare(model), bare_optimizers(optimizer)
        refuse_meta(self.model)
        reshard(self.model)
        self.layout = Layout.of(self.model, spread=True)
        self._share = Share.of(self.model, self.layout, self._ranks.rank, self._ranks.size)
        self._described = describe_optimizers(self.model, self.optimizers)

    @property
    def steps(self) -> int:
        """Steps recorded so far; where a resumed loop goes on."""
        return self._steps if self._course is None else self._course.steps

    @property
    def resumed(self) -> bool:
        """Whether it goes on with a recording that was cut off."""
        return self._resumed is not None

    @property
    def first(self) -> bool:
        """Whether this is the first of the processes that record together: the one that talks."""
        return self._ranks.first

    @property
    def processes(self) -> int:
        """How many record together."""
        return self._ranks.size

    # -- what a training loop calls ---------------------------------------------------------------------------

    def batch(self, indices: Sequence[int] | Tensor, seed: int | None = None, weight: float | None = None) -> None:
        """Notes which samples the coming step sees; once per micro-batch under gradient accumulation.

        Args:
            indices: of the training samples, in the order of the batch.
            seed: what random augmentation was drawn from, if any, so that the batch can be made again.
            weight: factor on this micro-batch's mean loss in the gradient, in this process; by default 1 / (micro-batches of the
                step).
        """
        self._notes.batch(indices, seed, weight)

    def watch(self, loader: DataLoader[Any]) -> WatchedLoader:
        """The loader, to iterate over: the samples of each batch are noted for the coming step, as by ``batch``.

        Any map-style data set, sampler and workers will do; each process watches its own loader. The next
        gradient must be of the batch that came out last; a batch without a gradient counts as skipped.
        """
        return self._loaders.watched(loader)

    def without_samples(self) -> None:
        """Steps come without samples, as whoever trains knows: nothing more is said of it."""
        self._notes.told = True

    def gradient_scale(self, factor: float | Tensor) -> None:
        """Notes the factor that clipping put on the coming step's gradient: ``min(1, max_norm / (norm + 1e-6))``."""
        whole = factor.full_tensor() if hasattr(factor, "full_tensor") else factor  # a norm over sharded gradients
        self._notes.line["gradient_scale"] = float(whole)

    def skip(self) -> None:
        """Drops what was noted for a step that was not taken; harmless after one that was.

        What a GradScaler skips is noticed without it.
        """
        self._notes.drop()

    def average(self, state: Mapping[str, Tensor]) -> None:
        """Adds averaged weights (EMA, SWA) as the path's last piece; call it after the last step, in every process.

        Args:
            state: by parameter name; names that are missing keep their last value. Whole tensors, or sharded as the model's are.
        """
        reshard(self.model)
        if self._tape is not None:
            self._tape.average(state)
        self._following.lines += 1
        self._averaged = True

    @contextmanager
    def jump(self) -> Iterator[None]:
        """Around code that sets the model's weights between two steps (prunes them): one straight piece of the path that

        is neither the gradients' nor the decay's. Nothing is added when nothing changes. Every process goes through it.
        """
        tape = self._tape
        before = None if tape is None else tape.present()
        yield
        changed = tape is not None and before is not None and not np.array_equal(before, tape.present())
        if any(self._ranks.exchange(lambda: changed)):
            self._following.lines += 1
            if tape is not None:
                tape.set(left=before)
                tape.watch.keep()

    def flush(self) -> None:
        """Waits until everything so far is on disk, where a ``Trajectory`` can read it while recording goes on."""
        self._ranks.exchange(lambda: None if self._tape is None else self._tape.writer.flush())

    @classmethod
    def resume(
        cls,
        folder: str | Path | Remote,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Any = None,
        *,
        taken: int | None = None,
        alone: bool | None = None,
    ) -> Recorder:
        """A recorder that goes on where the last snapshot of an interrupted recording was taken.

        Model, optimizer, scheduler and torch's random state are put back; ``steps`` says how many steps are done. Recorded
        steps after the snapshot are dropped, to be taken again. The processes may be more or fewer than before, and shard the
        model or not.

        Args:
            taken: the loop has put everything back itself, from a checkpoint after this many of its steps. The recording, also
                one that was complete, goes on at the state that the model's weights equal; nothing is put back.
            alone: as in ``Recorder``.

        Raises:
            ArtifactError: no trajectory or no snapshot there, it is complete, or it is another model's.
        """

        def read() -> dict[str, Any]:
            if isinstance(place := placed(folder), Remote):
                raise UsageError(f"{place}: a recording goes on in a folder of this machine; copy it into one first")
            found = going_on(place, complete=taken is not None)
            Layout.from_json(found["layout"]).check(model, spread=True)
            return found

        header = Together(alone).exchange(read)[0]
        recorder = cls(
            folder, model, optimizer, header["provenance"], every=header["every"], states=header["states"],
            second_moments=header["second_moments"], scheduler=scheduler, snapshot_every=header["snapshot_every"], alone=alone,
        )  # fmt: skip
        recorder._header = header
        held = (recorder.folder, recorder.model, recorder._share, recorder._ranks)
        if taken is None:
            recorder._resumed = restored(*held, header, recorder.optimizers, scheduler)
        else:
            recorder._resumed = position(*held, taken)
        recorder._resumed.setdefault("lines", recorder._resumed["step"])
        recorder._steps = int(recorder._resumed["step"])
        recorder.aside = recorder._resumed.get("aside", {})
        return recorder

    # -- entering and leaving ----------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._started = time.perf_counter()
        try:
            facts = self._ranks.exchange(self._facts)
        except PrunekitError:
            if self._spool is not None:
                self._spool.drop()
            raise
        agree_on(facts)
        replay = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.model.modules())
        spans = [one["spans"] for one in facts] if self._share.sharded else None
        if self._resumed is None:
            self._header: dict[str, Any] = {
                "schema": SCHEMA, "kind": "trajectory", "complete": False, "layout": self.layout.to_json(),
                "dtype": "F64" if path_dtype(self.model) == torch.float64 else "F32",
                "states": self.kind, "every": self.every, "second_moments": self.second_moments, "random": replay,
                "snapshot_every": self.snapshot_every, "optimizer": self._described,
                "provenance": {"prunekit": __version__, "torch": torch.__version__, **self.provenance},
                **({} if spans is None else {"parts": [part_json(spans, {}, 0)]}),
            }  # fmt: skip
            fresh = True
        else:
            fresh = go_on_in(self._header, spans, self._resumed, self.layout.total)
            self._ranks.exchange(self._write_header)  # it is not complete any more, before anything of it is dropped
        sealed = self._ranks.exchange(lambda: self._open(fresh, {"second_moments": self.second_moments, "random": replay}))
        if fresh and self._resumed is not None:
            before = {int(rank): files for one in sealed for rank, files in one.items()}
            self._header["parts"][-2]["files"] = [before[rank] for rank in sorted(before)]
        if fresh:
            self._ranks.exchange(self._write_header)
        members = Members(self.model, self.layout, self.optimizers, self._header["optimizer"])
        options = Options(self.every, self.snapshot_every, self.scheduler, lambda: self.aside)
        self._course = Course(
            self._ranks, self._share, self._called, self.model, self.optimizers, self._notes, members, self._tape, options,
            self._write_header,
        )  # fmt: skip
        lines = 0 if self._resumed is None else int(self._resumed["lines"])
        self._course.follow(self._steps, lines, replay, self._resumed is None)
        return self

    def _facts(self) -> dict[str, Any]:
        place = self.folder if self._spool is None else self._spool.remote
        if self._resumed is None and (place / "trajectory.json").exists():
            raise ArtifactError(f"{place}: already holds a trajectory; choose another folder or remove it")
        options = {"every": self.every, "states": self.kind, "second_moments": self.second_moments}
        options["snapshot_every"] = self.snapshot_every
        return facts_of(self.folder, self.model, self._share, self._described, options, self._ranks.size)

    @property
    def _following(self) -> Course:
        if self._course is None:
            raise UsageError("Recorder: recording has not begun; call this inside its with block")
        return self._course

    def _write_header(self) -> None:
        if not self.first:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(self.folder / "trajectory.json", self._header)
        except OSError as error:
            raise no_room(self.folder, self.steps, error) from error

    def _open(self, fresh: bool, streams: Mapping[str, bool]) -> dict[str, dict[str, str]]:
        """Opens the files of this process; returns checksums of the part before, where a new one begins."""
        if not self._share.writes:
            return {}
        rank, size, sealed = self._ranks.rank, self._ranks.size if self._share.sharded else 1, {}
        place = place_in(self.folder, self._header, rank, self._resumed)
        try:
            if fresh and self._resumed is not None:
                sealed = seal_before(self.folder, self._header, self.layout, rank, size)
            self._tape = Tape(
                self.model, self.optimizers, self._share, rank, place, self.kind,
                {**streams, "random": streams["random"] and rank == 0}, fresh, self.steps,
            )  # fmt: skip
            if self._resumed is None:
                self._tape.writer.start_with(self._tape.watch.copy_to(self._tape.writer.row()))
            else:
                (place.folder / ENDED).unlink(missing_ok=True)
        except OSError as error:
            raise no_room(self.folder, 0, error) from error
        self._tape.watch.keep()
        return sealed

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._following.close()
        self._loaders.forget()
        ranks, tape, failure = self._ranks, self._tape, None
        if kind is None:
            try:
                self._end_path()
            except PrunekitError as problem:
                failure = problem
        if kind is None and failure is None:
            found = ranks.exchange(lambda: self._close(self._ended))
            ranks.exchange(lambda: self._write_end(found, True))
            if tape is not None:
                tape.remove_snapshots()
            if self._spool is not None:
                self._spool.send()
            return
        ranks.leave()  # the others are not kept waiting
        try:
            if tape is not None and not tape.kept_last:
                tape.writer.put(tape.watch.copy_kept(tape.writer.row()), None)
            closed = self._close({})
            if not (self._share.sharded and ranks.size > 1):  # what the others have come to is not known
                self._write_end([closed], False)
        except PrunekitError as problem:
            failure = failure or problem
        if self._spool is not None and (lost := self._spool.sent()) is not None:
            warnings.warn(Note(str(lost)), stacklevel=2)  # what the loop failed with is raised
        if kind is None and failure is not None:
            raise failure

    def _end_path(self) -> None:
        """Takes in what moved since the last step, and the state that it left.

        Raises:
            PrunekitError: what is recorded is not what the model is made of any more.
        """
        tape, whole = self._tape, self._ranks.size > 1 and not self._share.sharded

        def look() -> dict[str, Any]:
            reshard(self.model)
            self._ended = {} if tape is None else tape.last()
            moved = [] if tape is None or self._averaged else tape.watch.moved(buffers=True)
            own = dict(self.model.named_parameters()) if whole else {}
            return {"moved": moved, "weights": checkpoint.tensor_checksum(own)}

        found = self._ranks.exchange(look)
        if self.first and any(one["weights"] != found[0]["weights"] for one in found):
            warnings.warn(
                "Recorder: the processes have ended with different weights, and the recording is of process 0; are their "
                "gradients averaged (DistributedDataParallel)?",
                Note,
                stacklevel=4,
            )
        if tape is not None and any(one["moved"] for one in found):
            tape.set()
        if tape is not None and not tape.kept_last:
            tape.writer.put(tape.watch.copy_kept(tape.writer.row()), None)

    def _close(self, ended: Mapping[str, Tensor]) -> dict[str, Any] | None:
        if self._tape is None:
            return None
        try:
            closed = self._tape.close(ended)
        except OSError as problem:
            raise no_room(self.folder, self.steps, problem) from problem
        if isinstance(closed, PrunekitError):
            raise closed
        return {**closed, "last_state": not self._tape.kept_last}

    def _write_end(self, found: Sequence[Mapping[str, Any] | None], complete: bool) -> None:
        if not self.first or found[0] is None:
            return
        cost = {"seconds": round(time.perf_counter() - self._started, 3)}
        self._header = {**ended(self.folder, self._header, found, complete), "last_state": found[0]["last_state"], "cost": cost}
        self._write_header()
