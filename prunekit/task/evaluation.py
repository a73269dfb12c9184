"""A model measured on samples, batch by batch: rows that add up are kept, outputs are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Batch, Inputs, Labels, call, described, device_of, fresh, take, to
from prunekit.data.samples import Samples
from prunekit.data.sharing import mixes, sharing
from prunekit.errors import PrunekitError, UsageError, quoted
from prunekit.measure.measure import Lost, Measure
from prunekit.progress import Bar
from prunekit.task.classification import Classification
from prunekit.task.task import Task

MEMORY = 64 * 2**20  # bytes of another model's outputs that are kept; beyond that they are computed again
KEPT, SHARE = 2 * 2**30, 8
"""Of what is free one part in ``SHARE``, at most ``KEPT`` bytes, where many models are compared with the same one: of a language
model on 1,000 windows the dense outputs are a gigabyte, and would be computed again in every comparison."""
AT_ONCE = 2**28
"""Numbers that a batch's outputs may have where a sample has one a place and word: 1 GiB in single precision."""
PIECE = 2**24
"""Numbers of these that are measured at once, some of it in double precision."""


class References:
    """A model's outputs on samples, to compare others with: kept while they fit ``memory`` bytes, else computed again.

    Attributes:
        whole: whether several ranks may not share the samples.
    """

    def __init__(self, model: nn.Module, samples: Samples, task: Task, memory: int = MEMORY) -> None:
        self.model, self.samples, self.task, self._left = model, fitting(model, samples, task), task, memory
        self.whole = mixing(model, self.samples, task)
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def of_many(cls, model: nn.Module, samples: Samples, task: Task) -> References:
        """For comparing many models on the same samples: more is kept, as much as the machine can spare."""
        return cls(model, samples, task, max(MEMORY, min(KEPT, spare(device_of(model)) // SHARE)))

    def beside(self, own: Samples) -> Iterator[tuple[Batch, Tensor]]:
        """Batches and outputs; ``own`` are a rank's of the samples, always the same."""
        for number, batch in enumerate(own):
            found = self._kept.get(number)
            if found is None:
                found = _placed(run(self.model, batch, self.task), self.task)
                if (needed := found.numel() * found.element_size()) <= self._left:
                    self._kept[number], self._left = found, self._left - needed
            yield batch, found


def spare(device: torch.device) -> int:
    """Bytes that are free, of a graphics card its own; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0


def unfit(who: str, inputs: Inputs, error: Exception, where: str = "") -> UsageError:
    """The refusal of a model that fails on what it is given: says which inputs it got, and what it or torch said to them."""
    return UsageError(f"model: {who} fails on {where}inputs {described(inputs)}: {quoted(error)}")


@torch.no_grad()
def run(model: nn.Module, batch: Batch, task: Task) -> Tensor:
    """The outputs that count of a batch, on the model's device, in evaluation mode; the model's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    model.eval()
    try:
        return task.outputs(call(model, fresh(to(batch[0], device))))
    finally:
        for module, mode in modes.items():
            module.training = mode


def fitting(model: nn.Module, samples: Samples, task: Task) -> Samples:
    """The same samples in batches whose outputs have at most ``AT_ONCE`` numbers, of a task that is measured in place."""
    most = max((len(group) for group in samples.groups), default=0)
    if not task.measured_in_place or most < 2:
        return samples
    fit = max(1, AT_ONCE // max(1, run(model, samples.rows(0, 1), task).numel()))
    return samples if most <= fit else samples.bounded(fit)


def mixing(model: nn.Module, samples: Samples, task: Task) -> bool:
    """Whether several ranks may not share samples, since what one gets depends on the others of its batch."""
    return mixes(lambda batch: run(model, batch, task), samples)


def _placed(outputs: Tensor, task: Task) -> Tensor:
    """Where the task's measures want outputs; MPS has no double precision."""
    return outputs if task.measured_in_place and outputs.device.type != "mps" else outputs.cpu()


def _each(measure: Measure, outputs: Tensor, labels: Labels, reference: Tensor | None, task: Task) -> Tensor:
    """A measure's rows of a batch: ``(samples, k)``, float64, on the CPU."""
    each = max(1, PIECE // max(1, outputs[0].numel())) if task.measured_in_place else max(1, len(outputs))
    parts = []
    for begin in range(0, len(outputs), each):
        some = slice(begin, begin + each)
        of_some = labels if each >= len(outputs) else take(labels, some, len(outputs))
        against = of_some if reference is None else (reference[some].to(outputs.device), of_some)
        parts.append(measure.each(outputs[some], against).double().cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on samples.

    Attributes:
        measures: against labels, then of closeness where there was a reference.
        rows: by measure, ``(samples, k)``, float64.
    """

    measures: tuple[Measure, ...]
    rows: dict[str, Tensor]
    samples: int

    def figures(self) -> dict[str, float]:
        """Measure -> figure."""
        return {measure.name: measure.of(self.rows[measure.name]) for measure in self.measures}

    def where(self, mask: Tensor) -> Evaluation:
        """The same on some of the samples."""
        return Evaluation(self.measures, {name: rows[mask] for name, rows in self.rows.items()}, int(mask.sum()))

    def lost(self, reference: Evaluation) -> tuple[float, float]:
        """What of the first measure was lost against ``reference`` on the same samples, and its standard error."""
        first = self.measures[0]
        return first.lost(self.rows[first.name], reference.rows[first.name])


def evaluate(
    model: nn.Module, samples: Samples, task: Task, references: References | None = None, bar: Bar | None = None
) -> Evaluation:
    """Measures a model; with ``references`` of the same samples also how close it is to that model.

    Args:
        bar: advances by the samples.

    Raises:
        UsageError: there are no samples.
    """
    own = task.measured_on(samples.bytes_per_token)
    measures = (*own, *(task.closeness if references is not None else ()))
    close = set(task.closeness) if references is not None else set()
    if not len(samples):
        raise UsageError("there are no samples to measure on")
    found: dict[str, list[Tensor]] = {measure.name: [] for measure in measures}
    fit = fitting(model, samples, task) if references is None else references.samples
    whole = mixing(model, fit, task) if references is None else references.whole
    with sharing(fit, whole) as (mine, _):
        pairs = references.beside(mine) if references is not None else ((batch, None) for batch in mine)
        for batch, reference in pairs:
            outputs = _placed(run(model, batch, task), task)
            labels = to(batch[1], outputs.device)
            if bar is not None:
                bar.advance(len(outputs))
            for measure in measures:
                try:
                    found[measure.name].append(_each(measure, outputs, labels, reference if measure in close else None, task))
                except PrunekitError:
                    raise
                except Exception as error:  # labels that do not fit, or a measure of the user's
                    raise task.cause(f"measure {measure.name}", outputs, labels, error) from error
        rows = {name: ranks.rows(torch.cat(parts)) for name, parts in found.items()}
    return Evaluation(measures, rows, len(samples))


def compared(pruned: Evaluation, dense: Evaluation) -> Lost:
    """What ``pruned`` lost against ``dense`` on the same samples."""
    name = dense.measures[0].name
    lost, error = pruned.lost(dense)
    found: Lost = {"samples": pruned.samples, "dense": dense.figures()[name], "pruned": pruned.figures()[name], "lost": lost}
    if pruned.samples > 1:
        found["standard_error"] = error
    return found


class MeasureTold(TypedDict):
    """What artifacts say of a measure; ``close`` is whether it is one of closeness to the dense model."""

    name: str
    better: str
    unit: str
    close: bool


def measures_told(task: Task) -> list[MeasureTold]:
    """What artifacts say of a task's measures."""
    return told_of(task.measures) + told_of(task.closeness, close=True)


def told_of(measures: Iterable[Measure], close: bool = False) -> list[MeasureTold]:
    """What artifacts say of some measures."""
    return [{"name": m.name, "better": m.better, "unit": m.unit, "close": close} for m in measures]


CLASSIFICATION = measures_told(Classification())
"""What artifacts that are older than other tasks mean."""
