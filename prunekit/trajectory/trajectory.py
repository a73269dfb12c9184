"""A recorded path of a model's weights, read back piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint, ranks, temporary
from prunekit.errors import ArtifactError, NonFiniteError, UsageError
from prunekit.remote import Remote, placed
from prunekit.trajectory.bare import bare
from prunekit.trajectory.copies import copied
from prunekit.trajectory.layout import Layout, refuse_meta
from prunekit.trajectory.parts import JoinedRows, joined_tensors, open_rows, open_states, parts_of, random_parts
from prunekit.trajectory.proof import ENDED, FIXED, LOG, START, Proof
from prunekit.trajectory.rules import Recursion, Rules, StepLog, optimizer_parts, start_counts, survival
from prunekit.trajectory.store import DTYPES, joint_hash

SCHEMA = 1


@dataclass(frozen=True)
class Segment:
    """One straight piece of the path, all vectors ``(P,)``: ``D = end - start = U + R``.

    Attributes:
        index: of the first optimizer step inside.
        steps: how many optimizer steps it covers.
        regularisation: ``R``: weight decay's share, and what moved by neither gradient nor decay (running
            statistics, averaged weights).
        surviving: ``Σ ω_s U_s``, the part of ``U`` that decay leaves until the end of training; only from
            ``segments(survival=True)``.
        jump: whether weights were set inside (pruned, averaged): such a piece can be long.
    """

    index: int
    start: Tensor
    end: Tensor
    regularisation: Tensor
    steps: int = 1
    surviving: Tensor | None = None
    jump: bool = False

    @property
    def update(self) -> Tensor:
        """``D``, the whole move."""
        return self.end - self.start

    @property
    def data_update(self) -> Tensor:
        """``U = D - R``, what the gradients did."""
        return self.end - self.start - self.regularisation


class Trajectory:
    """Opens a recorded trajectory; one that was cut off opens up to its last whole step.

    Args:
        folder: where it lies: a folder of this machine, or an address for fsspec (``s3://bucket/trajectory``), of which rows
            are read when they are asked for.
        rules: of optimizers that prunekit does not know, by name, such as ``{"my_module.MyOptimizer": "my_module:MyRule"}``;
            see ``prunekit.trajectory.rules``.

    Raises:
        UsageError: ``rules`` names what is no rule.
        ArtifactError: there is none, its files are truncated, or it was written by a newer schema.
    """

    def __init__(self, folder: str | Path | Remote, rules: Rules | None = None) -> None:
        self.folder, self._rules = placed(folder), rules
        self._own: TemporaryDirectory[str] | None = None
        self.header: dict[str, Any] = checkpoint.read_json(self.folder / "trajectory.json", "trajectory")
        with checkpoint.reading(self.folder / "trajectory.json", "trajectory"):
            self._open()

    def _open(self) -> None:
        header = self.header
        if header["schema"] != SCHEMA:
            raise ArtifactError(f"{self.folder}: schema {header['schema']}, this prunekit reads {SCHEMA}")
        if not isinstance(header["provenance"], dict):
            raise TypeError("provenance is no mapping")
        self.layout = Layout.from_json(header["layout"])
        self.complete: bool = header["complete"]
        self._proof = Proof(self.folder, header.get("files"))
        self._parts = parts_of(self.folder, header, self.layout)
        log, kept = self._read_log(None if self.complete else self._parts[-1].lines_written())
        if self.complete and len(log) != header["steps"]:
            path = self.folder / LOG
            raise ArtifactError(f"{path}: truncated ({len(log)} steps, {header['steps']} recorded)")
        if header.get("last_state"):
            kept[-1] = True
        self._rows = [0, *(index + 1 for index, is_kept in enumerate(kept) if is_kept)]
        self._log = log[: self._rows[-1]]  # steps after the last state that was kept cannot be reached
        dtype, total = DTYPES[header["dtype"]], self.layout.total
        self._states = open_states(self._parts, header["states"], len(self._rows), total, dtype)
        self._moments: JoinedRows | None = None
        if header["second_moments"]:
            taken = sum(step.moved for step in self._log)
            self._moments = open_rows(self._parts, "second_moments", taken, total, dtype)
        start = joined_tensors(self._parts[0], START) if header["optimizer"] else {}
        self.start_optimizer = start
        counts = start_counts(header["optimizer"], self.start_states, self._rules)
        self.recursion = Recursion(self.layout, header["optimizer"], self._log, self._moments is not None, counts, self._rules)

    @cached_property
    def start_states(self) -> dict[str, dict[str, Tensor]]:
        """By parameter name, its optimizer's state before the first step: entry -> tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.start_optimizer.items():
            name, entry = key.rsplit("|", 1)
            found.setdefault(name, {})[entry] = tensor
        return found

    @classmethod
    def of(cls, *models: nn.Module) -> Trajectory:
        """The path through models in memory, in training order; of one alone, its weights and no path.

        Criteria that look at no path (``magnitude``, ``taylor`` …) score by one model; ``influence`` needs two, such as the
        pretrained and the fine-tuned one, and takes the path between them as straight.

        Raises:
            ArtifactError: the models' tensors are not the same ones.
            NonFiniteError: a model holds NaN or Inf.

        Example:
            >>> import torch
            >>> from prunekit import Trajectory, score
            >>> model = torch.nn.Linear(4, 2)
            >>> score(Trajectory.of(model), model, criterion="magnitude").importance["weight"].equal(model.weight.abs())
            True
        """
        from prunekit.trajectory.imported import write_checkpoints  # which records, and a recorder reads trajectories

        if not models:
            raise UsageError("Trajectory.of takes one model at least")
        for model in models:
            refuse_meta(bare(model))
        folder = temporary.folder()
        states = [bare(model).state_dict() for model in models]
        with ranks.apart():  # each has its own
            write_checkpoints(Path(folder.name), copied(bare(models[-1])), states)
        found = cls(folder.name)
        found._own = folder  # lives as long as the trajectory
        return found

    def __len__(self) -> int:
        """The number of optimizer steps N; there are N + 1 states when every one was kept."""
        return len(self._log)

    @property
    def pieces(self) -> int:
        """Straight pieces between kept states."""
        return len(self._rows) - 1

    @property
    def kept(self) -> frozenset[int]:
        """Numbers of the states that were kept."""
        return frozenset(self._rows)

    def pieces_until(self, index: int) -> int:
        """How many straight pieces lead to state ``index``.

        Raises:
            UsageError: there is no such state, or it was not kept; the nearest that were are named.
        """
        if index in self._rows:
            return self._rows.index(index)
        nearest = sorted(sorted(self._rows, key=lambda row: abs(row - index))[:2])
        raise UsageError(f"{self.folder}: keeps no state {index}; the nearest are {' and '.join(map(str, nearest))}")

    @property
    def provenance(self) -> dict[str, Any]:
        found: dict[str, Any] = self.header["provenance"]
        return found

    def asked(self, option: str, value: str) -> str:
        """How whoever made this recording asks for an option of ``Recorder``: by a recipe's key, or in Python."""
        by_recipe = "recipe" in self.provenance and "recorded" not in self.provenance
        return f"train.record.{option}: {value.lower()} in the recipe" if by_recipe else f"Recorder(..., {option}={value})"

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        if isinstance(self.folder, Remote):
            return sum(self.folder.files().values())
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @cached_property
    def hash(self) -> str:
        """Identifies the recorded states; computed when recording was cut off before it could be noted."""
        return str(self.header.get("hash") or self._states.digest())

    def verify(self) -> None:
        """Reads everything that was recorded and compares with what was noted when recording ended.

        Raises:
            ArtifactError: they differ: something was changed after it was recorded.
        """
        _ = self.fixed
        if "files" in self.header:
            streams = [self._states, self._moments, self._random if self.header["random"] else None]
            for stream in streams:
                if stream is not None:
                    stream.read()
            return
        recorded = self.header.get("hash")
        parts = [self._states.digest()]
        if self._moments is not None:
            parts.append(self._moments.digest())
        if self.header["random"]:
            parts.append(self._random.digest())
        found = joint_hash(parts)
        if recorded is not None and found != recorded:
            raise ArtifactError(f"{self.folder}: the states were changed after they were recorded (hash {found}, was {recorded})")

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        """What the model needs beside the path: frozen parameters, integer buffers, as they are at its end."""
        last = self._parts[-1]
        start = self._start_fixed if len(self._parts) == 1 else joined_tensors(last, FIXED)
        return {**start, **(joined_tensors(last, ENDED, optional=True) if self.complete else {})}

    @cached_property
    def _start_fixed(self) -> dict[str, Tensor]:
        return joined_tensors(self._parts[0], FIXED)

    @property
    def rule_note(self) -> str:
        """A sentence when decay and data cannot be told apart; empty otherwise."""
        return self.recursion.note

    @property
    def foreign_rules(self) -> dict[str, str]:
        """Optimizer -> import path of its rule, of rules that are not prunekit's own."""
        return self.recursion.foreign

    def step(self, index: int) -> StepLog:
        """What was logged of step ``index``."""
        return self._log[index]

    def state(self, index: int) -> Tensor:
        """The weights before step ``index``, ``(P,)``; ``len(self)`` or -1 for the last. Between kept states, the

        point on the straight line between them.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        index = index % (len(self) + 1)
        upper = next(i for i, at in enumerate(self._rows) if at >= index)
        if self._rows[upper] == index:
            return self._row(upper)
        low, high = self._rows[upper - 1], self._rows[upper]
        return torch.lerp(self._row(upper - 1), self._row(upper), (index - low) / (high - low))

    def _row(self, row: int) -> Tensor:
        state = self._states.state(row)
        # One pass tells of most: NaN and Inf stay in a sum. Looking at every number makes and reads tensors of the same size.
        if not state.sum().isfinite() and not torch.isfinite(state).all():
            bad = next(e.name for e in self.layout if not torch.isfinite(state[e.span]).all())
            raise NonFiniteError(f"{self.folder}: state {self._rows[row]} has NaN or Inf in {bad}")
        return state

    def second_moments(self, step: int) -> Tensor | None:
        """Adam's raw ``v`` (amsgrad: its running maximum) after step ``step``, ``(P,)``; None if not recorded."""
        if self._moments is None or not self._log[step].moved:
            return None
        return self._moments.row(self.recursion.taken[step] - 1)

    def random_states(self, step: int) -> list[Tensor] | None:
        """torch's random state before each forward pass of ``step``; None for models without dropout."""
        if not self.header["random"]:
            return None
        first = self.forwards(step)
        return [self._random.row(first + i) for i in range(self._forwards[step])]

    def forwards(self, step: int) -> int:
        """Forward passes before step ``step`` whose random state was recorded."""
        return sum(self._forwards[:step])

    @cached_property
    def _random(self) -> JoinedRows:
        width = torch.get_rng_state().numel()
        return open_rows(random_parts(self._parts, width), "random", sum(self._forwards), width, np.dtype(np.uint8))

    def model_state(self, index: int = -1) -> dict[str, Tensor]:
        """State ``index`` by name, with the fixed part: enough for ``load_state_dict`` up to tied names."""
        fixed = self.fixed if index in (-1, len(self)) else self._start_fixed
        return {**fixed, **{k: v.clone() for k, v in self.layout.views(self.state(index)).items()}}

    def segments(
        self, stride: int = 1, *, begin: int = 0, end: int | None = None, survival: bool = False, until: int | None = None
    ) -> Iterator[Segment]:
        """The path's pieces in order.

        Args:
            stride: how many pieces between kept states are taken as one straight piece.
            begin, end: only pieces that start at optimizer steps in ``[begin, end)``: a phase of training.
            survival: also fill ``Segment.surviving``.
            until: the path ends at this state, one that was kept; None for the last.
        """
        pieces = self.pieces if until is None else self.pieces_until(until)
        weights = self._survival[0] if survival else None
        running = torch.zeros_like(self._row(0))
        last = self._row(0)
        for row in range(0, pieces, stride):
            stop = min(row + stride, pieces)
            first = start = last
            share = torch.zeros_like(start)
            left = torch.zeros_like(start) if survival else None
            for piece in range(row, stop):
                low, high = self._rows[piece], self._rows[piece + 1]
                first, last = last, self._row(piece + 1)
                for s in range(low, high):
                    theta = first if s == low else torch.lerp(first, last, (s - low) / (high - low))
                    before = share.clone() if left is not None else None
                    self.recursion.regularisation(s, theta, self.second_moments(s), running, share)
                    self._set_aside(s, (last - first) / (high - low), share)
                    if not self._log[s].moved:
                        running[(last == 0) & (first != 0)] = 0  # what is pruned loses its optimizer state as well
                    if left is not None and before is not None and weights is not None:
                        moved = (last - first) / (high - low) - (share - before)
                        left += self._scaled(moved, weights[s])
            if begin <= self._rows[row] < (len(self) if end is None else end):
                low, high = self._rows[row], self._rows[stop]
                jump = not all(step.moved for step in self._log[low:high])
                yield Segment(low, start, last, share, high - low, left, jump)

    def _set_aside(self, step: int, moved: Tensor, share: Tensor) -> None:
        """Running statistics and averaged weights are moved by neither gradient nor decay: they count as R."""
        if not self._log[step].moved:
            share += moved
            return
        for entry in self.layout:
            if entry.kind == "buffer":
                share[entry.span] += moved[entry.span]

    @cached_property
    def _survival(self) -> tuple[list[dict[str, float | Tensor]], dict[str, float | Tensor]]:
        return survival(self.recursion, self.second_moments)

    def surviving_start(self) -> Tensor:
        """``Π θ_0``: what decay leaves of the starting weights, ``(P,)``."""
        return self._scaled(self.state(0), self._survival[1])

    def _scaled(self, vector: Tensor, weights: dict[str, float | Tensor]) -> Tensor:
        scaled = vector.clone()
        for name, weight in weights.items():
            scaled[self.recursion.spans[name]] *= weight
        return scaled

    def _read_log(self, whole: int | None) -> tuple[list[StepLog], list[bool]]:
        path = self.folder / LOG
        defaults = [
            [{k: v for k, v in group.items() if k != "parameters"} for group in part["groups"]]
            for part in optimizer_parts(self.header["optimizer"])
        ] or [[]]
        steps: list[StepLog] = []
        kept: list[bool] = []
        self._forwards: list[int] = []
        for number, line in enumerate(
            islice(self._proof.log(), whole)
        ):  # a line cut off by a crash has no newline: not a whole step
            try:
                facts = json.loads(line)
                steps.append(_step(facts, defaults))
            except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
                raise ArtifactError(f"{path}: line {number + 1} is not a step") from None
            if facts.get("before"):
                kept[-1] = True
            kept.append(facts.get("state", True))
            self._forwards.append(facts.get("random", 0))
        return steps, kept


def _step(facts: dict[str, Any], optimizers: list[list[dict[str, Any]]]) -> StepLog:
    """``optimizers``: each one's groups with the hyperparameters that they began with."""
    moved = facts.get("moved", True)
    defaults = optimizers[facts.get("optimizer", 0)]
    given = facts.get("groups", [{} for _ in defaults])
    if len(given) > len(defaults):
        raise ValueError("more groups than the optimizer has")
    batches = facts.get("batches")
    count = len(batches or ())
    weights = facts.get("weights") or [None] * count
    return StepLog(
        groups=tuple({**d, **g} for d, g in zip(defaults, given, strict=False)),  # groups may be added later
        batches=None if batches is None else tuple(tuple(b) for b in batches),
        weights=tuple(1 / count if w is None else w for w in weights),
        seeds=tuple(facts.get("seeds") or [None] * count),
        gradient_scale=facts.get("gradient_scale", 1.0),
        without_gradient=frozenset(facts.get("without_gradient", ())),
        moved=moved,
        optimizer=facts.get("optimizer", 0),
        behind=facts.get("behind", 0),
    )
