"""What happens at each step of a recorded training: what the processes noted comes together, and is queued for writing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit.errors import Note, UsageError
from prunekit.trajectory import snapshot
from prunekit.trajectory.describe import group_options, skipped
from prunekit.trajectory.gathered import as_bytes, as_text, gathered, told
from prunekit.trajectory.members import Members
from prunekit.trajectory.notes import Notes
from prunekit.trajectory.shards import Share
from prunekit.trajectory.tape import Tape
from prunekit.trajectory.together import Together


@dataclass(frozen=True)
class Options:
    """How often what is kept; see ``Recorder``. ``aside``: gives a loop's own figures, for snapshots."""

    every: int
    snapshot_every: int
    scheduler: Any
    aside: Callable[[], dict[str, Any]]


class Course:
    """Follows the optimizers' steps.

    Args:
        called: the module that the loop calls; ``model``: what it is made of.
        notes: what the loop notes for the coming step.
        tape: what this process writes to; None where it writes nothing.
        header_changed: called when the optimizers got further parameters.

    Attributes:
        steps: taken so far; ``lines``: of the step log, states that were set included.
    """

    def __init__(
        self,
        ranks: Together,
        share: Share,
        called: nn.Module,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        notes: Notes,
        members: Members,
        tape: Tape | None,
        options: Options,
        header_changed: Callable[[], None],
    ) -> None:
        self.ranks, self.share, self.called, self.model, self.optimizers = ranks, share, called, model, list(optimizers)
        self.notes, self.members, self.tape, self.options, self.header_changed = notes, members, tape, options, header_changed
        self.steps = self.lines = self._noted = 0
        self._snapshot: dict[str, Any] | None = None
        self._random_due: dict[str, str] = {}
        self._warned = False
        self._hooks: list[Any] = []

    def follow(self, steps: int, lines: int, random: bool, begins: bool) -> None:
        """Begins, after ``steps`` steps and ``lines`` lines of the log.

        Args:
            random: note torch's random state before each forward pass.
            begins: the recording does too, and with a snapshot.
        """
        self.steps, self.lines = steps, lines
        for one in self.optimizers:
            self._hooks.append(one.register_step_pre_hook(self._before_step))
            self._hooks.append(one.register_step_post_hook(self._after_step))
        if random:
            self._hooks.append(self.called.register_forward_pre_hook(self._before_forward))
        self.notes.watch()
        if self.options.snapshot_every and begins:
            self._take_snapshot()
            self._write_snapshot(self.ranks.exchange(lambda: {"random": self._random_due}))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.notes.close()

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.notes.random.append(torch.get_rng_state())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        number = next(i for i, one in enumerate(self.optimizers) if one is optimizer)
        found = self.ranks.exchange(lambda: self._told(optimizer, number))
        if self.ranks.size > 1:
            self._take_in(found)
        if moved := sorted({name for one in found for name in one["moved"]}):
            if self.tape is not None:
                self.tape.set()
            self.lines += 1
            if not self._warned and self.ranks.first:
                named = ", ".join(moved[:3]) + (" and others" if len(moved) > 3 else "")
                warnings.warn(
                    f"Recorder: {named} moved between two steps; the path has this as weights that were set, by no sample. If "
                    "another optimizer trains them, record both: Recorder(folder, model, [first, second])",
                    stacklevel=2,
                )
            self._warned = True
        if self.share.sharded and self.tape is not None:
            self.tape.drop_snapshots(min(one["newest"] for one in found))
        if self._snapshot is not None:
            self._write_snapshot(found)
        self._random_due = {}
        self._noted = len(self.notes.line.get("batches", ()))

    def _told(self, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Any]:
        """What this process has to say before a step of ``optimizer``."""
        if self.tape is not None:
            if self.members.changed:
                self.members.add_groups()
                self.header_changed()
            self.tape.watch.check_step(optimizer)
        if getattr(getattr(self.called, "_join_config", None), "enable", False):
            raise UsageError(
                "Recorder: DistributedDataParallel.join lets processes end at different steps, which no recording can follow; "
                "give each the same number of batches (a DistributedSampler pads them, drop_last=True cuts them)"
            )
        several = self.ranks.size > 1
        return {
            "optimizer": number,
            "skipped": skipped(optimizer),
            "notes": told(self.notes.line, self.notes.random) if several else None,
            "moved": [] if self.tape is None else self.tape.watch.moved(),
            "newest": self.tape.snapshots[-1] if self.tape is not None and self.tape.snapshots else -1,
            "random": self._random_due,
        }

    def _take_in(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Notes of all processes become this step's."""
        for key, what in (("optimizer", "step optimizers in another order"), ("skipped", "skip other steps")):
            if any(one[key] != found[0][key] for one in found):
                raise UsageError(f"Recorder: processes {what} than process 0; all of them must take the same steps")
        line, random, unknown = gathered([one["notes"] for one in found])
        kept = {key: value for key, value in self.notes.line.items() if key not in ("batches", "seeds", "weights")}
        self.notes.line, self.notes.random = {**kept, **line}, random
        if unknown and self.ranks.first and not self.notes.told:
            warnings.warn(
                f"Recorder: which samples this step sees is not known ({unknown}); call recorder.batch(indices) or iterate over "
                "recorder.watch(loader) in every process. Explanations by training samples and replaying will not work",
                Note,
                stacklevel=4,
            )
            self.notes.told = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        number = next(i for i, one in enumerate(self.optimizers) if one is optimizer)
        if self.ranks.size > 1 and len(self.notes.line.get("batches", ())) != self._noted:
            raise UsageError("Recorder: batch() was called inside the step; where several processes train, call it before")
        line, random, behind = self.notes.of_step(number, self.lines)
        if skipped(optimizer):
            return
        self.steps += 1
        if self.tape is not None:
            line["groups"] = [
                {k: v for k, v in group_options(group).items() if k == "lr" or start.get(k) != v}
                for group, start in zip(optimizer.param_groups, self.members.groups[number], strict=True)
            ]
            if missing := [name for name, parameter in self.members.stepped[number] if parameter.grad is None]:
                line["without_gradient"] = missing
            line |= {"optimizer": number} if len(self.optimizers) > 1 else {}
            line |= {"behind": behind} if behind else {}
            keep = self.steps % self.options.every == 0
            line |= {} if keep else {"state": False}
            line |= {"random": len(random)} if random else {}
            self.tape.step(optimizer, line if self.ranks.first else {}, random if self.ranks.first else [], keep)
        self.lines += 1
        if self.options.snapshot_every and self.steps % self.options.snapshot_every == 0:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        tape, model = self.tape, self.model
        if tape is not None:
            self._snapshot = snapshot.take(self.steps, self.lines, model, self.optimizers, tape.rows, self.ranks.rank)
        else:
            self._random_due = {name: as_text(state) for name, state in snapshot.random_states(model).items()}

    def _write_snapshot(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Writes what was taken; ``found``: the processes that write nothing have told their random states."""
        if self._snapshot is None or self.tape is None:
            return
        snapshot.add_schedule(self._snapshot, self.optimizers, self.options.scheduler)
        self._snapshot["header"]["aside"] = json.loads(json.dumps(self.options.aside()))  # as it is now, not when it is written
        for rank, one in enumerate(found):
            self._snapshot["tensors"] |= {f"{name}|{rank}": as_bytes(text) for name, text in one["random"].items()}
        self.tape.put_snapshot(self._snapshot)
        self._snapshot = None
