"""Batches beside another model's outputs for them, kept while they fit a memory budget, else fetched and computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prunekit.batch import Batch, Inputs, Labels, leaves, size, taken, to
from prunekit.data.samples import Samples
from prunekit.task.evaluation import MEMORY


class Referenced:
    """``(inputs, (reference, labels))`` batch by batch, on ``device``, as ``Task.divergence`` takes them.

    Without ``outputs`` plain batches ``(inputs, labels)``, kept in the same way.

    Args:
        outputs: ``(inputs, labels) -> reference``, called without gradients.
        memory: bytes of batches and references that are kept.

    Attributes:
        samples: how many.
    """

    def __init__(
        self,
        source: Samples,
        outputs: Callable[[Inputs, Labels], Tensor] | None,
        device: torch.device | str,
        memory: int = MEMORY,
    ) -> None:
        self.source, self.outputs, self.device = source, outputs, torch.device(device)
        self.samples = len(source)
        self._left = memory
        self._kept: dict[int, Batch] = {}

    def __len__(self) -> int:
        """How many batches."""
        return len(self.source.groups)

    def __getitem__(self, number: int) -> Batch:
        if number not in range(len(self)):
            raise IndexError(number)
        found = self._kept.get(number)
        if found is None:
            inputs, labels = to(self.source.batch(number), self.device)
            found = (inputs, labels)
            if self.outputs is not None:
                with torch.no_grad():
                    found = inputs, (self.outputs(inputs, labels), labels)
            needed = sum(t.numel() * t.element_size() for part in found for t in leaves(part))
            if needed <= self._left:
                self._kept[number], self._left = found, self._left - needed
        return found

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def few(self, count: int = 2) -> Batch:
        """The first samples, to try things on."""
        inputs, labels = self[0]
        return taken((inputs, labels), slice(0, min(count, size(inputs))))
