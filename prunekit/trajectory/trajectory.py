"""A recorded path of a model's weights, read back step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.errors import ArtifactError, NonFiniteError
from prunekit.trajectory.layout import Layout
from prunekit.trajectory.rules import StepLog, WholeUpdate, rule_for
from prunekit.trajectory.store import StateReader


@dataclass(frozen=True)
class Segment:
    """One straight piece of the path, all vectors ``(P,)``: ``D = end - start = U + R``."""

    index: int
    start: Tensor
    end: Tensor
    regularisation: Tensor

    @property
    def update(self) -> Tensor:
        """``D``, the whole move."""
        return self.end - self.start

    @property
    def data_update(self) -> Tensor:
        """``U = D - R``, what the gradients did."""
        return self.end - self.start - self.regularisation


class Trajectory:
    """Opens a recorded trajectory.

    Raises:
        ArtifactError: there is none, its files are truncated, or it was written by a newer schema.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header: dict[str, Any] = checkpoint.read_json(self.folder / "trajectory.json", "trajectory")
        if self.header["schema"] != 1:
            raise ArtifactError(f"{self.folder}: schema {self.header['schema']}, this prunekit reads 1")
        self.layout = Layout.from_json(self.header["layout"])
        self.complete: bool = self.header["complete"]
        self._log = self._read_log()
        if self.complete and len(self._log) != self.header["steps"]:
            raise ArtifactError(
                f"{self.folder / 'steps.jsonl'}: truncated ({len(self._log)} steps, {self.header['steps']} recorded)"
            )
        self._reader = StateReader(
            self.folder, self.layout.total, self.header["dtype"], len(self._log) + 1, self.header["rows_per_block"]
        )

    def __len__(self) -> int:
        """The number of steps N; there are N + 1 states."""
        return len(self._log)

    @property
    def provenance(self) -> dict[str, Any]:
        found: dict[str, Any] = self.header["provenance"]
        return found

    @cached_property
    def hash(self) -> str:
        """Identifies the recorded states; computed when recording was cut off before it could be noted."""
        return str(self.header.get("hash") or self._reader.digest())

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        """What the model needs beside the path: frozen parameters, integer buffers."""
        return checkpoint.read_tensors(self.folder / "fixed.safetensors")

    @property
    def rule_note(self) -> str:
        """A sentence when the optimizer has no rule of its own; empty otherwise."""
        return str(getattr(rule_for(self.header["optimizer"]), "note", ""))

    def step(self, index: int) -> StepLog:
        """What was logged of step ``index``."""
        return self._log[index]

    def state(self, index: int) -> Tensor:
        """State ``index`` as ``(P,)``, negative from the end.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        row = self._reader.row(index % (len(self) + 1))
        if not torch.isfinite(row).all():
            bad = next(e.name for e in self.layout if not torch.isfinite(row[e.span]).all())
            raise NonFiniteError(f"{self.folder}: state {index} has NaN or Inf in {bad}")
        return row

    def model_state(self, index: int = -1) -> dict[str, Tensor]:
        """State ``index`` by name, with the fixed part: enough for ``load_state_dict`` up to tied names."""
        return {**self.fixed, **{k: v.clone() for k, v in self.layout.views(self.state(index)).items()}}

    def segments(self, stride: int = 1) -> Iterator[Segment]:
        """The path's pieces in order; with ``stride`` k, k steps at a time are taken as one straight piece."""
        optimizer = self.header["optimizer"]
        members = [group["parameters"] for group in optimizer["groups"]] if optimizer else []
        rule = (WholeUpdate if optimizer is None else rule_for(optimizer))(self.layout, members)
        last = self.state(0)
        for begin in range(0, len(self), stride):
            start = last
            share = torch.zeros_like(start)
            for s in range(begin, min(begin + stride, len(self))):
                rule.regularisation(last, self._log[s], share)
                last = self.state(s + 1)
            for entry in self.layout:
                if entry.kind == "buffer":  # running statistics are moved by neither gradient nor decay
                    share[entry.span] = last[entry.span] - start[entry.span]
            yield Segment(begin, start, last, share)

    def _read_log(self) -> list[StepLog]:
        path = self.folder / "steps.jsonl"
        optimizer = self.header["optimizer"]
        defaults = [{k: v for k, v in g.items() if k != "parameters"} for g in optimizer["groups"]] if optimizer else []
        steps = []
        try:
            lines = path.read_text().split("\n")
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(lines[:-1]):  # a line cut off by a crash has no newline: not a whole step
            try:
                facts = json.loads(line)
            except ValueError:
                raise ArtifactError(f"{path}: line {number + 1} is not JSON") from None
            groups = tuple({**d, **g} for d, g in zip(defaults, facts.get("groups", []), strict=True))
            batches = facts.get("batches")
            steps.append(
                StepLog(
                    groups,
                    None if batches is None else tuple(tuple(b) for b in batches),
                    frozenset(facts.get("without_gradient", ())),
                )
            )
        return steps
