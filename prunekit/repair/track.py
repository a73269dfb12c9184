"""The path that a live model takes while mask and weights are learnt together, as states that lead from one to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunekit import ranks
from prunekit.repair.live import Live
from prunekit.trajectory import Layout, Polygon, Trajectory, parent_facts, room_for
from prunekit.trajectory.bare import named_tensors

STATES = 32
"""States that are kept, at most, where nobody says how many steps lie between two: each takes 4 bytes a parameter."""


@dataclass(frozen=True)
class Recording:
    """Where the states of learning go.

    Attributes:
        folder: of the trajectory, made anew, of several ranks the first one's.
        parent: the dense model's, which the recording names and which stays as it is.
        every: so many steps lie between two states that are kept; None: ``STATES`` are, or as few as half of what is free on the
            disk has room for.
    """

    folder: Path
    parent: Trajectory
    every: int | None = None


class Track:
    """Records a live model: weights as they are masked, softly or not, before every step, and those that are taken in the end.

    Args:
        live: whose private model is looked at, as it is scaled.
        steps: that are to come.
    """

    def __init__(self, how: Recording, live: Live, layout: Layout, steps: int) -> None:
        self._live, self._layout, self._stack = live, layout, ExitStack()
        self._polygon: Polygon | None = None
        if ranks.first():
            room = room_for(how.folder) // (2 * 4 * layout.total)
            every = how.every or -(-max(1, steps) // max(1, min(STATES, room)))
            self._polygon = Polygon(how.folder, live.function.model, parent_facts(how.parent), every=every, layout=layout)

    def begin(self) -> None:
        """The model as it is scaled now is where the path begins: the dense one leads there in a straight piece."""
        if self._polygon is not None:
            with ranks.apart():
                self._stack.enter_context(self._polygon)

    @contextmanager
    def set(self) -> Iterator[None]:
        """Around what sets the model's weights, which no step moved there."""
        if self._polygon is None:
            yield
            return
        with ranks.apart(), self._polygon.jump():
            yield

    def step(self) -> None:
        """It was moved by a step."""
        if self._polygon is not None:
            with ranks.apart():
                self._polygon.step()

    @torch.no_grad()
    def end(self, model: nn.Module, moved: bool) -> None:
        """The path ends at a model with its mask in place.

        Args:
            moved: the last step leads there; else it is gone back to.
        """
        found, held = named_tensors(model), named_tensors(self._live.function.model)
        with nullcontext() if moved else self.set():
            for entry in self._layout:
                held[entry.name].copy_(found[entry.name])
        if moved:
            self.step()
        with ranks.apart():
            self._stack.close()

    def abandon(self, error: BaseException) -> None:
        """Learning failed: what is written stays as far as it came."""
        self._stack.__exit__(type(error), error, error.__traceback__)
