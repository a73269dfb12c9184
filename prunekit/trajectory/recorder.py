"""Leaving a trajectory behind: two lines in any training loop, written in the background."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError, PrunekitError
from prunekit.trajectory import snapshot
from prunekit.trajectory.describe import describe_optimizer, flat_second_moments, group_options
from prunekit.trajectory.layout import Layout, fixed_state
from prunekit.trajectory.states import BASE_EVERY
from prunekit.trajectory.store import NAMES
from prunekit.trajectory.writer import BackgroundWriter, no_room
from prunekit.version import __version__

SCHEMA = 1


class Recorder:
    """Records every optimizer step of ``model`` under ``folder``.

    Args:
        folder: where the trajectory goes; it must not hold one yet (``resume`` goes on with one).
        model: the model being trained; its floating-point buffers are recorded as well.
        optimizer: any ``torch.optim.Optimizer``; its post-step hook triggers the recording, so learning rates
            are the ones the step used, and steps that a GradScaler skips are not recorded.
        provenance: facts to keep with the trajectory (recipe, seeds); JSON values.
        every: keep the state of every so-many-th step only; rates and batches are kept of all.
        states: ``"whole"``, or ``"half"`` for half-precision differences: half the disk, see docs/kernel.md.
        second_moments: also keep Adam's ``v`` after each step, which data-wise scores and coupled decay need.
        scheduler: kept in the snapshots, for ``resume``.
        snapshot_every: steps between two snapshots of what the next step depends on; 0 for none.

    Call :meth:`batch` with the indices of the samples that the coming step sees; only data-wise scores need it.
    States cost ``4 P`` bytes a step on disk (``8 P`` for float64 models), P the number of coordinates; second moments
    as much again; a snapshot (one at a time) about ``12 P`` for Adam.

    Raises:
        ArtifactError: the folder already holds a trajectory, or the disk is full; the steps so far stay readable.
        NonFiniteError: a weight became NaN or Inf.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
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
        self.folder, self.model, self.optimizer, self.scheduler = Path(folder), model, optimizer, scheduler
        self.provenance = dict(provenance or {})
        self.every, self.kind, self.second_moments, self.snapshot_every = every, states, second_moments, snapshot_every
        self.layout = Layout.of(model)
        self.steps = 0
        """Steps recorded so far; where a resumed loop goes on."""
        self._line: dict[str, Any] = {}
        self._random: list[Tensor] = []
        self._resumed: dict[str, Any] | None = None
        self._snapshot: dict[str, Any] | None = None
        self._kept_last = True

    # -- what a training loop calls ---------------------------------------------------------------------------

    def batch(self, indices: Sequence[int] | Tensor, seed: int | None = None, weight: float | None = None) -> None:
        """Notes which samples the coming step sees; once per micro-batch under gradient accumulation.

        Args:
            indices: of the training samples, in the order of the batch.
            seed: what random augmentation was drawn from, if any, so that the batch can be made again.
            weight: factor on this micro-batch's mean loss in the gradient; by default 1 / (micro-batches of the step).
        """
        found = indices.tolist() if isinstance(indices, Tensor) else indices
        self._line.setdefault("batches", []).append([int(i) for i in found])
        self._line.setdefault("seeds", []).append(seed)
        self._line.setdefault("weights", []).append(weight)

    def gradient_scale(self, factor: float | Tensor) -> None:
        """Notes the factor that clipping put on the coming step's gradient: ``min(1, max_norm / (norm + 1e-6))``."""
        self._line["gradient_scale"] = float(factor)

    def skip(self) -> None:
        """Drops what was noted for a step that was not taken (a GradScaler found Inf); harmless after one that was."""
        self._line, self._random = {}, []

    def average(self, state: Mapping[str, Tensor]) -> None:
        """Adds averaged weights (EMA, SWA) as the path's last piece; call it after the last step.

        Args:
            state: by parameter name; names that are missing keep their last value.
        """
        with torch.no_grad():
            named: dict[str, Tensor] = {**self._named(), **{k: v for k, v in state.items() if k in self._named()}}
            row = self._writer.row()
            self.layout.flatten(named, out=torch.from_numpy(row))
        self._writer.put(row, self._set_line())

    @contextmanager
    def jump(self) -> Iterator[None]:
        """Around code that sets the model's weights between two steps (prunes them): one straight piece of the path that

        is neither the gradients' nor the decay's. Nothing is added when nothing changes.
        """
        before = self._flat_state(np.empty(self.layout.total, self._dtype))
        kept = self._kept_last
        yield
        row = self._flat_state(np.empty(self.layout.total, self._dtype))
        if np.array_equal(before, row):
            return
        if not kept:
            buffer = self._writer.row()
            buffer[:] = before
            self._writer.put(buffer, None)
        buffer = self._writer.row()
        buffer[:] = row
        self._kept_last = True
        self._writer.put(buffer, {"moved": False} if kept else {"moved": False, "before": True})

    def flush(self) -> None:
        """Waits until everything so far is on disk, where a ``Trajectory`` can read it while recording goes on."""
        self._writer.flush()

    def _set_line(self) -> dict[str, Any]:
        line: dict[str, Any] = {"moved": False}
        if not self._kept_last:
            self._writer.put(self._flat_state(self._writer.row()), None)
            line["before"] = True  # the state that the last step left lies before this one
        self._kept_last = True
        return line

    @classmethod
    def resume(cls, folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Recorder:
        """A recorder that goes on where the last snapshot of an interrupted recording was taken.

        Model, optimizer, scheduler and torch's random state are put back as they were; ``steps`` says how many steps
        are done. Recorded steps after the snapshot are dropped, to be taken again.

        Raises:
            ArtifactError: no trajectory or no snapshot there, it is complete, or it is another model's.
        """
        header = checkpoint.read_json(Path(folder) / "trajectory.json", "trajectory")
        if header["complete"]:
            raise ArtifactError(f"{folder}: recording was complete after {header['steps']} steps; nothing to resume")
        Layout.from_json(header["layout"]).check(model)
        recorder = cls(
            folder, model, optimizer, header["provenance"], every=header["every"], states=header["states"],
            second_moments=header["second_moments"], scheduler=scheduler, snapshot_every=header["snapshot_every"],
        )  # fmt: skip
        recorder._header = header
        recorder._resumed = snapshot.restore(Path(folder), model, optimizer, scheduler)
        recorder.steps = int(recorder._resumed["step"])
        return recorder

    # -- entering and leaving ----------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if self._resumed is None and (self.folder / "trajectory.json").exists():
            raise ArtifactError(f"{self.folder}: already holds a trajectory; choose another folder or remove it")
        self._started = time.perf_counter()
        # Looked up once: walking the modules at every step would cost more than copying the weights.
        named = self._named()
        self._tensors = [(entry.span, named[entry.name].detach()) for entry in self.layout]
        names = {id(p): name for name, p in self.model.named_parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._stepped = [(names[id(p)], p) for p in held if id(p) in names]
        dtype = np.dtype(np.float64 if any(p.dtype == torch.float64 for p in self.model.parameters()) else np.float32)
        self._dtype = dtype
        replay = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.model.modules())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._resumed is None:
                self._begin(dtype, replay)
            rows = self._resumed["rows"] if self._resumed else {}
            streams = {"second_moments": self.second_moments, "random": replay}
            self._writer = BackgroundWriter(self.folder, self.layout, dtype, self.kind, streams, rows, self.steps)
            if self._resumed is None:
                self._writer.start_with(self._flat_state(self._writer.row()))
                checkpoint.write_json(self.folder / "trajectory.json", self._header)
        except OSError as error:
            raise no_room(self.folder, 0, error) from error
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        if replay:
            self._hooks.append(self.model.register_forward_pre_hook(self._before_forward))
        if self.snapshot_every and self._resumed is None:
            self._take_snapshot()
            self._write_snapshot()
        return self

    def _begin(self, dtype: np.dtype[Any], replay: bool) -> None:
        fixed, _ = checkpoint.unique_state(fixed_state(self.model, self.layout))
        checkpoint.write_tensors(self.folder / "fixed.safetensors", fixed, {"kind": "fixed"})
        start = snapshot.optimizer_tensors(self.model, self.optimizer)
        checkpoint.write_tensors(self.folder / "start.safetensors", start, {"kind": "start"})
        self._header: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "trajectory",
            "complete": False,
            "layout": self.layout.to_json(),
            "dtype": NAMES[dtype],
            "states": self.kind,
            "every": self.every,
            "second_moments": self.second_moments,
            "random": replay,
            "snapshot_every": self.snapshot_every,
            "optimizer": describe_optimizer(self.model, self.optimizer),
            "provenance": {"prunekit": __version__, "torch": torch.__version__, **self.provenance},
        }

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        if not self._kept_last:
            self._writer.put(self._flat_state(self._writer.row()), None)
        failure = self._writer.close()
        if failure is None:
            try:
                cost = {"seconds": round(time.perf_counter() - self._started, 3)}
                checkpoint.write_json(
                    self.folder / "trajectory.json",
                    {
                        **self._header,
                        "complete": kind is None,
                        "steps": self._writer.lines,
                        "last_state": not self._kept_last,
                        "hash": self._writer.hash,
                        "cost": cost,
                    },
                )
                if kind is None:
                    (self.folder / snapshot.NAME).unlink(missing_ok=True)
            except OSError as problem:
                failure = no_room(self.folder, self.steps, problem)
        if failure is not None and kind is None:
            raise failure

    # -- hooks -------------------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self._random.append(torch.get_rng_state())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        line, self._line = self._line, {}
        line["groups"] = [
            {k: v for k, v in group_options(group).items() if k == "lr" or start.get(k) != v}
            for group, start in zip(optimizer.param_groups, self._header["optimizer"]["groups"], strict=True)
        ]
        if not any(s is not None for s in line.get("seeds", ())):
            line.pop("seeds", None)
        if not any(w is not None for w in line.get("weights", ())):
            line.pop("weights", None)
        missing = [name for name, parameter in self._stepped if parameter.grad is None]
        if missing:
            line["without_gradient"] = missing
        self.steps += 1
        self._kept_last = self.steps % self.every == 0
        if not self._kept_last:
            line["state"] = False
        row = self._flat_state(self._writer.row()) if self._kept_last else None
        moments = None
        if self.second_moments:
            moments = self._writer.row()
            flat_second_moments(self.model, optimizer, self.layout.parameters, torch.from_numpy(moments))
        random, self._random = self._random, []
        if random:
            line["random"] = len(random)
        self._writer.put(row, line, moments, [r.numpy() for r in random])
        if self.snapshot_every and self.steps % self.snapshot_every == 0:
            self._take_snapshot()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._snapshot is not None:
            self._write_snapshot()

    def _take_snapshot(self) -> None:
        self._snapshot = snapshot.take(self.steps, self.model, self.optimizer, self._writer.queued)

    def _write_snapshot(self) -> None:
        assert self._snapshot is not None
        snapshot.add_schedule(self._snapshot, self.optimizer, self.scheduler)
        self._writer.put_snapshot(self._snapshot)
        self._snapshot = None

    def _named(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @torch.no_grad()
    def _flat_state(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        flat = torch.from_numpy(row)
        for span, tensor in self._tensors:
            flat[span].copy_(tensor.reshape(-1))
        return row


def disk_needed(
    model: nn.Module, steps: int, samples_seen: int, every: int = 1, states: str = "whole", second_moments: bool = False
) -> int:
    """Bytes that recording ``steps`` steps will take, the step log (8 bytes a sample seen) and a snapshot included."""
    width = 8 if any(p.dtype == torch.float64 for p in model.parameters()) else 4
    total = Layout.of(model).total
    rows = steps // every + 2
    per_state = total * (2 + width / BASE_EVERY if states == "half" else width)
    moments = total * width * steps if second_moments else 0
    return int(per_state * rows) + moments + 8 * samples_seen + 4 * total * width
