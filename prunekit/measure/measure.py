"""What a measure is: rows that add up over samples, and the number that their sums make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

import torch
from torch import Tensor

from prunekit.batch import Labels

BLOCKS = 20  # of samples, left out one after another where a measure does not add up


def mean(sums: Tensor, samples: int) -> Tensor:
    """The first column's mean."""
    return sums[..., 0] / samples


def ratio(sums: Tensor, samples: int) -> Tensor:
    """The first column's sum over the second's; 0 where that is 0."""
    return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1].clamp_min(1e-300), torch.zeros_like(sums[..., 0]))


AnyTold = TypeVar("AnyTold", bound="Told")


class Directed:
    """What has a direction and a unit."""

    name: str
    better: str
    unit: str

    @property
    def sign(self) -> float:
        """1 where a higher figure is better, -1 where a lower one is."""
        return 1.0 if self.better == "higher" else -1.0

    @property
    def scale(self) -> float:
        """What a figure is multiplied with to be in the unit."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Told(Directed):
    """A measure as artifacts tell of it: its name, direction and unit, and whether it is of closeness to the dense model."""

    name: str
    better: str
    unit: str
    close: bool


def told(measures: Iterable[Mapping[str, Any]]) -> list[Told]:
    """Measures as artifacts hold them."""
    return [Told(m["name"], m["better"], m["unit"], bool(m["close"])) for m in measures]


def choosing(measures: Sequence[AnyTold]) -> list[AnyTold]:
    """What one model is better than another by, in this order: the first measure, then closeness to the dense model."""
    return [*measures[:1], *(measure for measure in measures[1:] if measure.close)]


def merit(order: Iterable[Directed], figures: Mapping[str, float]) -> tuple[float, ...]:
    """What makes one model better than another, to be compared: the measures that choose, in their order and direction."""
    return tuple(measure.sign * figures[measure.name] for measure in order)


class Lost(TypedDict):
    """What a pruned model came to in the task's first measure, as a figure; how much was lost, in the measure's unit.

    ``standard_error`` is that of the paired difference over the same samples (``Measure.lost``, delete-one jackknife). For
    accuracy it follows from the discordant pairs alone: with ``b`` samples of ``n`` that only the dense model answers right and
    ``c`` that only the pruned one does, it is ``sqrt((b + c - (b - c)² / n) / (n (n - 1)))``, in points. One sample has none.
    """

    samples: NotRequired[int]
    dense: NotRequired[float]
    pruned: float
    lost: NotRequired[float]
    standard_error: NotRequired[float]


@dataclass(frozen=True)
class Measure(Directed):
    """One figure of a model on some samples.

    Attributes:
        name: as JSON keys and tables have it.
        each: ``(outputs, labels) -> (samples, k)``: what adds up over samples. Of a measure of closeness to another model,
            ``labels`` is ``(that model's outputs, labels)``.
        finish: ``(sums (..., k), samples) -> (...)``; of a measure that is ``whole``, ``rows (samples, k) -> scalar``.
        better: whether a higher or a lower figure is better.
        unit: ``"%"`` for a share, which is shown and lost in points; else as it is.
        whole: does not follow from sums (average precision); ``finish`` sees all rows.
    """

    name: str
    each: Callable[[Tensor, Labels], Tensor]
    finish: Callable[..., Tensor] = mean
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    whole: bool = False

    def of(self, rows: Tensor) -> float:
        """The figure from all rows ``(samples, k)``."""
        if self.whole:
            return float(self.finish(rows))
        sums = torch.stack([column.sum() for column in rows.t().contiguous()])
        return float(self.finish(sums, len(rows)))

    def lost(self, rows: Tensor, reference: Tensor) -> tuple[float, float]:
        """How much worse ``rows`` are than ``reference`` of the same samples, and the standard error of that, in the unit.

        The error is the delete-one jackknife's of the paired difference; of a ``whole`` measure, deleting blocks.
        """
        lost = self.sign * self.scale * (self.of(reference) - self.of(rows))
        return lost, self._spread(self._without(reference) - self._without(rows))

    def error(self, rows: Tensor) -> float:
        """The standard error of the figure itself, in the unit, by the same jackknife."""
        return self._spread(self._without(rows))

    def _without(self, rows: Tensor) -> Tensor:
        """The figure without each of the samples (of a ``whole`` measure, blocks), float64."""
        if self.whole:
            order = torch.arange(len(rows)) % min(BLOCKS, len(rows))
            blocks = range(int(order.max()) + 1)
            return torch.tensor([self.of(rows[order != block]) for block in blocks], dtype=torch.float64)
        return self.finish(rows.sum(0) - rows, max(len(rows) - 1, 1)).double()

    def _spread(self, left: Tensor) -> float:
        return self.scale * float(((left - left.mean()).square().mean() * (len(left) - 1)).sqrt())

    def shown(self, value: float) -> str:
        """A figure for tables, with its unit."""
        return f"{100 * value:.2f}%" if self.unit == "%" else f"{value:.4g}{' ' + self.unit if self.unit else ''}"
