"""Training, validation, test and scoring samples, addressed by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from prunekit import checkpoint
from prunekit.errors import UsageError

SPLITS = ("train", "validation", "test", "scoring")
"""What each is for: learning; every choice (compare, auto); the final figures; scores. They must be disjoint."""


class Split:
    """One set of samples: a pair of tensors, or a map-style dataset of ``(input, label)`` items."""

    def __init__(self, source: Any) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None
        if isinstance(source, Sequence) and len(source) == 2 and all(isinstance(t, Tensor) for t in source):
            if any(t.dim() == 0 for t in source) or len(source[0]) != len(source[1]):
                raise UsageError(
                    f"data: inputs {tuple(source[0].shape)} and labels {tuple(source[1].shape)} are not one each a sample"
                )
            self.pair = (source[0], source[1])
        elif isinstance(source, str | bytes | Mapping | list | tuple) or not (
            hasattr(source, "__len__") and hasattr(source, "__getitem__")
        ):
            raise UsageError(f"data: a split must be (inputs, labels) or a map-style dataset, not {type(source).__name__}")
        self._source = source
        if len(self) == 0:
            raise UsageError("data: a split is empty")

    def __len__(self) -> int:
        return len(self.pair[0]) if self.pair else len(self._source)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """``(inputs (k, ...), labels (k, ...))`` of the samples at ``indices``."""
        if self.pair:
            where = torch.as_tensor(indices)
            return self.pair[0][where], self.pair[1][where]
        try:
            inputs, labels = default_collate([self._source[int(i)] for i in indices])
        except Exception as error:  # the user's own data set
            raise UsageError(f"data: reading samples {list(indices)[:3]}… failed: {type(error).__name__}: {error}") from error
        if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
            raise UsageError("data: a sample must be (input, label), both tensors or numbers")
        return inputs, labels

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples in order, ``size`` at a time, at most ``limit`` of them."""
        total = len(self) if limit is None else min(limit, len(self))
        for begin in range(0, total, size):
            yield self.batch(range(begin, min(begin + size, total)))

    def digest(self) -> str:
        """Identifies the samples; of a dataset, its length and 64 samples spread over it, the last included."""
        last = len(self) - 1
        x, y = self.pair if self.pair else self.batch(sorted({round(i * last / 63) for i in range(64)}))
        return checkpoint.digest({"x": x, "y": y}, {"samples": len(self)})


def as_splits(found: Any, factory: str) -> dict[str, Split]:
    """Checks what a data factory returned: a mapping with the four ``SPLITS``.

    Raises:
        UsageError: names the missing split or the unfit value.
    """
    if not isinstance(found, Mapping):
        raise UsageError(f"{factory}: must return a mapping of splits ({', '.join(SPLITS)}), got {type(found).__name__}")
    missing = [name for name in SPLITS if name not in found]
    if missing:
        raise UsageError(f"{factory}: lacks the splits {', '.join(missing)}; it has {', '.join(map(str, found))}")
    return {name: Split(found[name]) for name in SPLITS}
