"""Which samples a loader's batches hold: ``Recorder.watch`` notes them as the batches come out."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from prunekit.errors import UsageError

Batches = list[list[int]]
"""Sample indices of what one step sees: one list a process."""


class Loaders:
    """The loaders of one recording; one is watched once, however often the loop begins with it anew, and keeps its workers.

    Args:
        note: called with the indices of every batch.
    """

    def __init__(self, note: Callable[[Batches], None]) -> None:
        self._note = note
        self._known: dict[int, WatchedLoader] = {}

    def watched(self, loader: DataLoader[Any]) -> WatchedLoader:
        """See ``Recorder.watch``."""
        if id(loader) not in self._known:
            new = WatchedLoader(loader, self._note)
            if other := next((w.loader.dataset for w in self._known.values() if w.loader.dataset is not loader.dataset), None):
                raise UsageError(
                    f"Recorder.watch: loaders of two data sets ({type(other).__name__}, {type(loader.dataset).__name__}), whose "
                    "indices cannot be told apart; join the data sets, or note indices with recorder.batch(indices)"
                )
            self._known[id(loader)] = new
        return self._known[id(loader)]


class WatchedLoader:
    """Gives what ``loader`` gives, and tells which samples each batch holds just before it comes out.

    Where it has workers, it draws batches ahead and gives them in the order in which it drew them; so the indices wait in that
    order too. It is copied, with the same data set and sampler, so that its own iteration stays as it is.

    Args:
        note: called with the indices of every batch.

    Raises:
        UsageError: its samples have no indices, or other processes' batches cannot be known.
    """

    def __init__(self, loader: DataLoader[Any], note: Callable[[Batches], None]) -> None:
        if not isinstance(loader, DataLoader):
            raise UsageError(f"Recorder.watch takes a DataLoader, not a {type(loader).__name__}; note what it gives with batch()")
        if isinstance(loader.dataset, IterableDataset):
            raise UsageError(
                f"Recorder.watch: {type(loader.dataset).__name__} is an iterable data set, whose samples have no indices; make "
                "it a map-style one, or note numbers of your own with recorder.batch(indices)"
            )
        self.loader, self._note = loader, note
        self._copy = copy.copy(loader)
        where = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._drawn = _Drawn(getattr(loader, where), _others(loader))
        vars(self._copy)[where] = self._drawn  # a loader lets nobody set it, and every kind of loader can be copied
        vars(self._copy)["_iterator"] = None  # the workers that it keeps are its own

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self._noted(iter(self._copy))

    def _noted(self, batches: Iterator[Any]) -> Iterator[Any]:
        waiting: deque[Batches] | None = None
        for batch in batches:
            waiting = self._drawn.waiting if waiting is None else waiting
            self._note(waiting.popleft())
            yield batch


class _Drawn:
    """A sampler, of batches or of single samples, that keeps what was drawn until it comes out.

    Attributes:
        waiting: what the last iteration that began has drawn, oldest first.
    """

    def __init__(self, sampler: Any, others: Callable[[], list[Iterable[Any]]]) -> None:
        self._sampler, self._others = sampler, others
        self.waiting: deque[Batches] = deque()

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        waiting = self.waiting = deque()
        others = [iter(other) for other in self._others()]
        for drawn in self._sampler:
            waiting.append([_indices(drawn), *(_indices(next(other)) for other in others)])
            yield drawn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is copied or sent to a worker, there is no sampler yet
            raise AttributeError(name)
        return getattr(self._sampler, name)


def _indices(drawn: Any) -> list[int]:
    found = drawn if isinstance(drawn, list | tuple | torch.Tensor) else [drawn]
    try:
        return [int(index) for index in found]
    except (TypeError, ValueError):
        raise UsageError(
            f"Recorder.watch: the sampler draws {str(found)[:60]}, and samples are noted by whole numbers; note them with "
            "recorder.batch(indices)"
        ) from None


def _others(loader: DataLoader[Any]) -> Callable[[], list[Iterable[Any]]]:
    """The batches that other processes draw in the same steps: a DistributedSampler says, by its seed, what each of them does.

    Raises:
        UsageError: several processes train, and what deals the samples out is none.
    """
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    if isinstance(sampler, DistributedSampler) and type(batches) in (BatchSampler, type(None)):

        def made() -> list[Iterable[Any]]:
            found: list[Iterable[Any]] = []
            for rank in range(sampler.num_replicas):
                if rank != sampler.rank:
                    other = copy.copy(sampler)  # with the epoch that set_epoch gave it
                    other.rank = rank
                    found.append(other if batches is None else BatchSampler(other, batches.batch_size, batches.drop_last))
            return found

        return made
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UsageError(
            f"Recorder.watch: {torch.distributed.get_world_size()} processes train, and what the others see is known of a "
            f"DistributedSampler alone, not of {type(batches or sampler).__name__}; note every process's indices with batch()"
        )
    return list
