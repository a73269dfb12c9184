"""The whole path of a fine-tuned model: its parent's training, the pruning in between, its own steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from prunekit import checkpoint
from prunekit.errors import ArtifactError, UsageError
from prunekit.remote import Place
from prunekit.trajectory.rules import StepLog
from prunekit.trajectory.trajectory import Segment, Trajectory


def parent_facts(parent: Trajectory, step: int | None = None) -> dict[str, Any]:
    """What a child's provenance says of its parent: its hash, and the state that the child branches off from."""
    return {"parent": {"trajectory": parent.hash, "step": len(parent) if step is None else step}}


class Continued(Trajectory):
    """``parent`` up to the state that ``child`` names, the straight piece to the child's first state, the child's pieces.

    It reads as one trajectory. The joining piece is pruning (and rewinding): neither gradients nor decay moved it, so all
    of it counts as ``regularisation``, like every state that was set.

    Raises:
        ArtifactError: the child has another parent (both hashes are named), or another layout.
    """

    def __init__(self, parent: Trajectory, child: Trajectory) -> None:
        self.parent, self.child = parent, child
        with checkpoint.reading(child.folder / "trajectory.json", "fine-tuning trajectory"):
            named, self.branch = str(child.provenance["parent"]["trajectory"]), int(child.provenance["parent"]["step"])
        if named != parent.hash:
            raise ArtifactError(f"{child.folder}: continues trajectory {named}, this run's is {parent.hash}")
        if child.layout != parent.layout:
            raise ArtifactError(f"{child.folder}: its coordinates are not those of {parent.folder}")
        self._before = parent.pieces_until(self.branch)
        self.folder: Place = child.folder
        self.header, self.layout, self.complete = child.header, child.layout, child.complete
        self.start_optimizer, self.start_states = parent.start_optimizer, parent.start_states

    def __len__(self) -> int:
        return self.branch + 1 + len(self.child)

    @property
    def pieces(self) -> int:
        return self._before + 1 + self.child.pieces

    @cached_property
    def hash(self) -> str:
        return checkpoint.digest({}, {"parent": self.parent.hash, "step": self.branch, "child": self.child.hash})

    def verify(self) -> None:
        self.parent.verify()
        self.child.verify()

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        return self.child.fixed

    @property
    def rule_note(self) -> str:
        return "; ".join(dict.fromkeys(note for note in (self.parent.rule_note, self.child.rule_note) if note))

    @property
    def foreign_rules(self) -> dict[str, str]:
        return {**self.parent.foreign_rules, **self.child.foreign_rules}

    def step(self, index: int) -> StepLog:
        if index == self.branch:
            return StepLog(moved=False)
        return self.parent.step(index) if index < self.branch else self.child.step(index - self.branch - 1)

    def state(self, index: int) -> Tensor:
        index = index % (len(self) + 1)
        return self.parent.state(index) if index <= self.branch else self.child.state(index - self.branch - 1)

    def second_moments(self, step: int) -> Tensor | None:
        if step == self.branch:
            return None
        return self.parent.second_moments(step) if step < self.branch else self.child.second_moments(step - self.branch - 1)

    @cached_property
    def joint(self) -> Segment:
        """The piece between parent and child."""
        start, end = self.parent.state(self.branch), self.child.state(0)
        return Segment(self.branch, start, end, end - start, jump=True)

    def segments(
        self, stride: int = 1, *, begin: int = 0, end: int | None = None, survival: bool = False, until: int | None = None
    ) -> Iterator[Segment]:
        """As a trajectory's; no piece of ``stride`` states goes across the joint.

        Raises:
            UsageError: ``survival`` or ``until``, which a path with a pruning in it does not know.
        """
        if survival or until is not None:
            raise UsageError("share 'survival' is not known past a pruning; rescore by kernel, regularisation or whole")
        after = self.branch + 1
        yield from self.parent.segments(stride, begin=begin, end=end, until=self.branch)
        if begin <= self.branch and (end is None or self.branch < end):
            yield self.joint
        inner_end = None if end is None else max(end - after, 0)
        for piece in self.child.segments(stride, begin=max(begin - after, 0), end=inner_end):
            yield replace(piece, index=piece.index + after)

    def random_states(self, step: int) -> list[Tensor] | None:
        if step == self.branch:
            return None
        return self.parent.random_states(step) if step < self.branch else self.child.random_states(step - self.branch - 1)

    def surviving_start(self) -> Tensor:
        raise UsageError("share 'survival' is not known past a pruning; rescore by kernel, regularisation or whole")
