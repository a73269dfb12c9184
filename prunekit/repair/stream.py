"""Batches that never end: samples in a new order in every pass, fetched as they are needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prunekit import ranks
from prunekit.batch import Batch, Labels, size, to
from prunekit.data import Samples
from prunekit.errors import UsageError


class Stream:
    """Fresh batches ``(inputs, labels)`` of samples, none of them twice before all were seen.

    Args:
        samples: fetched batch by batch, never held.
        batch_size: at most all samples.
        device: where batches are put.
        seed: of the orders.

    Attributes:
        batch_size: samples in a batch, the same in all.

    Raises:
        UsageError: there are no samples.
    """

    def __init__(self, samples: Samples, batch_size: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self._every = [int(i) for group in samples.groups for i in group]
        if not self._every:
            raise UsageError("there are no samples to learn from")
        self.samples, self.device, self.seed = samples, torch.device(device), seed
        self.batch_size = min(batch_size, len(self._every))

    def __iter__(self) -> Iterator[Batch]:
        return (to(self.samples.fetch(chosen), self.device) for chosen in self._chosen())

    def shared(self) -> Iterator[list[Batch]]:
        """The same batches, of each this rank's stretch, or nothing where there are more ranks than samples."""
        for chosen in self._chosen():
            own = ranks.stretch(len(chosen))
            yield [to(self.samples.fetch(chosen[own.start : own.stop]), self.device)] if own else []

    def _chosen(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self._every), generator=generator).tolist()
            for begin in range(0, len(order) - self.batch_size + 1, self.batch_size):  # what is left over waits for another pass
                yield [self._every[place] for place in order[begin : begin + self.batch_size]]

    def steps(self, tokens: int, what: str, least: int = 1) -> int:
        """Whole batches that so many tokens are.

        Args:
            what: takes them, for the message.

        Raises:
            UsageError: they are fewer than ``least``.
        """
        each = self.tokens()
        if tokens < least * each:
            need = f"give {least * each:,} at least, or a smaller batch"
            raise UsageError(f"{what}: tokens is {tokens:,}, and a batch of {self.batch_size} samples has {each:,}; {need}")
        return tokens // each

    def tokens(self) -> int:
        """Places that count in a batch, of the first one: of a text its tokens, of samples with one label each their number."""
        inputs, labels = self.samples.fetch(next(self._chosen()))
        return places(labels, size(inputs))


def places(labels: Labels, samples: int) -> int:
    """How many places labels have: one a token, a pixel or a sample."""
    whole = isinstance(labels, torch.Tensor) and not labels.is_floating_point() and labels.dim() > 1
    return labels.numel() if whole else samples
