"""Leaving a trajectory behind: two lines in any training loop, written in the background."""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError, NonFiniteError, PrunekitError
from prunekit.trajectory.layout import Layout, fixed_state
from prunekit.trajectory.rules import optimizer_name
from prunekit.trajectory.store import NAMES, StateWriter
from prunekit.version import __version__

SCHEMA = 1
QUEUE_ROWS = 8


class Recorder:
    """Records every optimizer step of ``model`` under ``folder``.

    Args:
        folder: where the trajectory goes; it must not hold one yet.
        model: the model being trained; its floating-point buffers are recorded as well.
        optimizer: any ``torch.optim.Optimizer``; its post-step hook triggers the recording, so learning rates
            are the ones the step used, and steps that a GradScaler skips are not recorded.
        provenance: facts to keep with the trajectory (recipe, seeds); JSON values.

    Call :meth:`batch` with the indices of the samples that the coming step sees; only data-wise scores need it.
    States cost ``4 P`` bytes a step on disk (``8 P`` for float64 models), P the number of coordinates.

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
    ) -> None:
        self.folder, self.model, self.optimizer = Path(folder), model, optimizer
        self.provenance = dict(provenance or {})
        self.layout = Layout.of(model)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._batches: list[list[int]] = []
        self._failure: BaseException | None = None
        self._steps = 0

    # -- what a training loop calls ---------------------------------------------------------------------------

    def batch(self, indices: Sequence[int] | Tensor) -> None:
        """Notes which samples the coming step sees; call once per micro-batch under gradient accumulation."""
        self._batches.append([int(i) for i in (indices.tolist() if isinstance(indices, Tensor) else indices)])

    def __enter__(self) -> Recorder:
        if (self.folder / "trajectory.json").exists():
            raise ArtifactError(f"{self.folder}: already holds a trajectory; choose another folder or remove it")
        self._started = time.perf_counter()
        doubles = any(p.dtype == torch.float64 for p in self.model.parameters())
        self._dtype = np.dtype(np.float64 if doubles else np.float32)
        description = self._describe_optimizer()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = StateWriter(self.folder, self.layout.total, self._dtype)
            checkpoint.write_tensors(
                self.folder / "fixed.safetensors",
                checkpoint.unique_state(fixed_state(self.model, self.layout))[0],
                {"kind": "fixed"},
            )
            self._header: dict[str, Any] = {
                "schema": SCHEMA,
                "kind": "trajectory",
                "complete": False,
                "layout": self.layout.to_json(),
                "dtype": NAMES[self._dtype],
                "rows_per_block": self._writer.rows_per_block,
                "optimizer": description,
                "provenance": {"prunekit": __version__, "torch": torch.__version__, **self.provenance},
            }
            self._writer.append(self._flat_state(np.empty(self.layout.total, self._dtype)))
            self._log = (self.folder / "steps.jsonl").open("w")
            checkpoint.write_json(self.folder / "trajectory.json", self._header)
        except OSError as error:
            raise _no_room(self.folder, 0, error) from error
        self._free: queue.Queue[np.ndarray] = queue.Queue()
        for _ in range(QUEUE_ROWS):
            self._free.put(np.empty(self.layout.total, self._dtype))
        self._pending: queue.Queue[tuple[np.ndarray, dict[str, Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write_pending, name="prunekit-recorder", daemon=True)
        self._thread.start()
        self._hook = self.optimizer.register_step_post_hook(self._after_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()
        self._pending.put(None)
        self._thread.join()
        if self._failure is not None:
            self._log.close()
            if kind is None:
                raise self._failure
            return
        try:
            digest = self._writer.finish()
            self._log.close()
            checkpoint.write_json(
                self.folder / "trajectory.json",
                {
                    **self._header,
                    "complete": kind is None,
                    "steps": self._steps,
                    "hash": digest,
                    "cost": {"seconds": round(time.perf_counter() - self._started, 3)},
                },
            )
        except OSError as failure:
            if kind is None:
                raise _no_room(self.folder, self._steps, failure) from failure

    # -- inside ----------------------------------------------------------------------------------------------

    def _describe_optimizer(self) -> dict[str, Any]:
        groups = []
        for group in self.optimizer.param_groups:
            unknown = [p for p in group["params"] if id(p) not in self._names]
            if unknown:
                raise PrunekitError(
                    f"the optimizer holds {len(unknown)} parameters that are not the model's (shapes "
                    f"{', '.join(str(tuple(p.shape)) for p in unknown[:3])}); make it from model.parameters()"
                )
            names = [self._names[id(p)] for p in group["params"] if p.requires_grad]
            groups.append({"parameters": names, **_options(group)})
        return {"name": optimizer_name(self.optimizer), "groups": groups}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._failure is not None:
            raise self._failure
        line: dict[str, Any] = {"groups": [_options(group) for group in optimizer.param_groups]}
        header = self._header["optimizer"]["groups"]
        line["groups"] = [
            {k: v for k, v in now.items() if k == "lr" or start.get(k) != v}
            for now, start in zip(line["groups"], header, strict=True)
        ]
        if self._batches:
            line["batches"], self._batches = self._batches, []
        missing = [
            self._names[id(p)] for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is None
        ]
        if missing:
            line["without_gradient"] = missing
        self._pending.put((self._flat_state(self._free.get()), line))
        self._steps += 1

    @torch.no_grad()
    def _flat_state(self, row: np.ndarray) -> np.ndarray:
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.layout.flatten(named, out=torch.from_numpy(row))
        return row

    def _write_pending(self) -> None:
        written = 0
        while (item := self._pending.get()) is not None:
            row, line = item
            if self._failure is None:
                try:
                    if not np.isfinite(row).all():
                        raise NonFiniteError(
                            f"step {written}: {self._first_bad(row)} became NaN or Inf; the trajectory ends before it"
                        )
                    self._writer.append(row)
                    self._log.write(json.dumps(line) + "\n")  # the line makes the step whole: it comes last
                    self._log.flush()
                    written += 1
                except OSError as error:
                    self._failure = _no_room(self.folder, written, error)
                except NonFiniteError as error:
                    self._failure = error
            self._free.put(row)

    def _first_bad(self, row: np.ndarray) -> str:
        return next(e.name for e in self.layout if not np.isfinite(row[e.span]).all())


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's scalar hyperparameters as JSON values."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, tuple):
            value = list(value)
        if value is None or isinstance(value, bool | int | float | str | list):
            found[key] = value
    return found


def _no_room(folder: Path, steps: int, error: OSError) -> ArtifactError:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 1e6
    return ArtifactError(
        f"{folder}: recording stopped after {steps} steps ({error.strerror or error}, {free:.0f} MB free); "
        "the steps so far can be read"
    )
