"""train.json: what a training came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from prunekit.artifact import SOMETIMES, Artifact, Cost
from prunekit.task.evaluation import MeasureTold

WATCHED = ("train", "validation")
"""Splits whose figures the record holds."""
AT_MOST = 4096
"""On so many samples of a split, spread over it evenly, its figures are measured: a pass over all training data, where those
are many, costs a third of an epoch."""


def measured_on(samples: int) -> int:
    """How many of a split's samples its figures are measured on.

    Example:
        >>> [measured_on(samples) for samples in (100, 4096, 1_000_000)]
        [100, 4096, 4096]
    """
    return min(samples, AT_MOST)


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(Artifact):
    """How a model was trained, in figures.

    Attributes:
        losses: mean training loss by epoch.
        accuracies: ``epoch`` and the first measure on ``WATCHED`` splits, now and then, where the recipe asks for it.
        accuracy: of the trained model by split, where the task's first measure is the accuracy.
        measure, figures: name and figures of another first measure.
        samples: by split, on how many its figures are, where it has more (``AT_MOST``).
        measures: all of them; None in a file that is older than tasks.
    """

    KIND: ClassVar[str] = "training"
    CALLED: ClassVar[str] = "training record"

    steps: int
    coordinates: int
    losses: list[float]
    accuracies: list[dict[str, float]]
    accuracy: dict[str, float] | None
    measure: str | None = field(default=None, metadata=SOMETIMES)
    figures: dict[str, float] | None = field(default=None, metadata=SOMETIMES)
    samples: dict[str, int] | None = field(default=None, metadata=SOMETIMES)
    measures: list[MeasureTold] | None = None
    cost: Cost

    @property
    def first(self) -> tuple[str, dict[str, float]] | None:
        """The task's first measure and its figures by split; None for a task without measures."""
        if self.accuracy is not None:
            return "accuracy", self.accuracy
        return None if self.measure is None or self.figures is None else (self.measure, self.figures)

    def check(self) -> None:
        """Every watched split has its figure."""
        if self.first is not None:
            _ = [self.first[1][split] for split in WATCHED]
