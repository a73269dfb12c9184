"""Which samples each batch of a trainer's own loader holds, by the order in which its sampler draws them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, IterableDataset


class Order:
    """Listens to the sampler of a loader that a trainer has made and iterates over itself.

    A trainer fetches batches ahead, so the moment when a batch leaves the loader says nothing about when it is trained on. The
    order of the draws and the batch's number in its epoch do. The sampler is replaced by one that keeps what it draws
    (``BatchSampler.sampler`` may be set at any time), until ``release``.

    Args:
        loader: a DataLoader, accelerate's included.

    Raises:
        ValueError: says why its batches cannot be known.
    """

    def __init__(self, loader: Any) -> None:
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            raise ValueError(f"{type(loader.dataset).__name__} is an iterable data set, whose samples have no indices")
        self._chain: list[Any] = []  # from the loader's batch sampler to the one that makes the batches
        batches = getattr(loader, "batch_sampler", None)
        while batches is not None and type(batches) is not BatchSampler:
            self._chain.append(batches)
            batches = getattr(batches, "batch_sampler", None)
        if batches is None or not all(hasattr(one, "num_processes") for one in self._chain):
            found = type(self._chain[0]).__name__ if self._chain else type(loader).__name__
            raise ValueError(f"batches are made by {found}, not by torch's BatchSampler")
        self._batches = batches
        self._heard: _Heard | None = None
        self._epoch: list[int] | None = None
        self._stream: Iterator[list[int]] = iter(())
        self._next = 0
        self._last: list[int] = []
        self.listen()

    def listen(self) -> None:
        """Puts itself in the sampler's place; again, where somebody has set another since."""
        if type(self._batches.sampler) is not _Heard:
            self._batches.sampler = _Heard(self._batches.sampler)
        self._heard = self._batches.sampler

    def release(self) -> None:
        """Puts the sampler back."""
        if type(self._batches.sampler) is _Heard:
            self._batches.sampler = self._batches.sampler._sampler

    def batch(self, number: int) -> list[int] | None:
        """Sample indices of this process's batch ``number`` of the present epoch; None where they were not heard.

        Numbers only grow in an epoch.
        """
        assert self._heard is not None
        if self._epoch is not self._heard.drawn:
            self._epoch = self._heard.drawn
            self._stream, self._next = iter(self._made(self._heard)), 0
        while self._next <= number:
            try:
                found = next(self._stream, None)
            except LookupError:  # it was drawn before anyone listened
                return None
            if found is None:
                return None
            self._last = found
            self._next += 1
        return self._last

    def _made(self, heard: _Heard) -> Any:
        """The batches of this process, made as its loader makes them, from what was drawn."""
        own = BatchSampler(_Drawn(heard), self._batches.batch_size, self._batches.drop_last)
        if not self._chain:
            return own
        shard = copy.copy(self._chain[-1])  # accelerate's: every process draws the same order and takes its share of the batches
        shard.batch_sampler = own
        return shard


class _Heard:
    """A sampler that keeps what was drawn since its last iteration began; in everything else the sampler that it stands for."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.drawn: list[int] = []
        self.ended = False

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        drawn: list[int] = []
        self.drawn, self.ended = drawn, False
        for index in self._sampler:
            drawn.append(int(index))
            yield index
        if self.drawn is drawn:
            self.ended = True

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # while it is copied, there is none yet
            raise AttributeError(name)
        return getattr(self._sampler, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._sampler)  # accelerate asks for its own samplers by class

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._sampler.__reduce_ex__(protocol)  # a checkpoint holds the sampler alone


class _Drawn:
    """What a sampler has drawn in the present epoch, as far as it has come."""

    def __init__(self, heard: _Heard) -> None:
        self._heard, self._drawn = heard, heard.drawn

    def __iter__(self) -> Iterator[int]:
        yield from self._drawn  # a list that grows meanwhile is followed to its end
        if self._heard.drawn is not self._drawn or not self._heard.ended:
            raise LookupError("asked for more than was drawn")
