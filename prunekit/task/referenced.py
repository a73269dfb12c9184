"""KeptBatches kept while they fit a memory budget, else fetched again; alone, or beside another model's outputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Batch, Inputs, Labels, leaves, size, taken, to
from prunekit.data.samples import Samples
from prunekit.task.evaluation import MEMORY


class Budget:
    """Bytes that are left for keeping things; several keepers may share them."""

    def __init__(self, size: int = MEMORY) -> None:
        self.left = size

    def covers(self, nest: object) -> bool:
        """Whether what the nest takes was left; it is not any more."""
        needed = sum(t.numel() * t.element_size() for t in leaves(nest))
        if needed > self.left:
            return False
        self.left -= needed
        return True


class KeptBatches:
    """``(inputs, labels)`` batch by batch, on ``device``, as often as one likes.

    Args:
        budget: for the batches that are kept; ``MEMORY`` bytes when None.
        dealt: of every batch this rank's stretch alone (``prunekit.ranks``); what is summed over batches must be added up.

    Attributes:
        samples: how many, on all ranks together.
        before: called before every pass over the batches.
    """

    def __init__(self, source: Samples, device: torch.device | str, budget: Budget | None = None, dealt: bool = False) -> None:
        self.source, self.device, self.budget, self.dealt = source, torch.device(device), budget or Budget(), dealt
        self.samples = len(source)
        self.before: Callable[[], object] = lambda: None
        self._kept: dict[int, Batch] = {}

    def __len__(self) -> int:
        """How many batches."""
        return len(self.source.groups)

    def _group(self, number: int) -> Sequence[int]:
        group = self.source.groups[number]
        own = ranks.stretch(len(group)) if self.dealt else range(len(group))
        return group[own.start : own.stop]

    def size(self, number: int) -> int:
        """Samples in a batch, on all ranks together."""
        return len(self.source.groups[number])

    def one(self, number: int) -> list[Batch]:
        """A batch; of a dealt one nothing where there are more ranks than samples."""
        return [self[number]] if len(self._group(number)) else []

    def __getitem__(self, number: int) -> Batch:
        if number not in range(len(self)):
            raise IndexError(number)
        found = self._kept.get(number)
        if found is None:
            found = to(self.source.fetch(self._group(number)), self.device)
            if self.budget.covers(found):
                self._kept[number] = found
        return found

    def __iter__(self) -> Iterator[Batch]:
        self.before()
        return (self[number] for number in range(len(self)) if len(self._group(number)))

    def few(self, count: int = 2) -> Batch:
        """The first samples, to try things on."""
        inputs, labels = self[0]
        return taken((inputs, labels), slice(0, min(count, size(inputs))))


class Referenced(KeptBatches):
    """``(inputs, (reference, labels))`` batch by batch, as ``Task.divergence`` takes them.

    Args:
        batches: kept once for all that are made from them, and their budget with them.
        outputs: ``(inputs, labels) -> reference``, called without gradients.
    """

    def __init__(self, batches: KeptBatches, outputs: Callable[[Inputs, Labels], Tensor]) -> None:
        super().__init__(batches.source, batches.device, batches.budget, batches.dealt)
        self._batches, self._outputs = batches, outputs
        self._references: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> Batch:
        inputs, labels = self._batches[number]
        found = self._references.get(number)
        if found is None:
            with torch.no_grad():
                found = self._outputs(inputs, labels)
            if self.budget.covers(found):
                self._references[number] = found
        return inputs, (found, labels)
