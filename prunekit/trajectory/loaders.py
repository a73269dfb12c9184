"""Which samples a loader's batches hold: ``Recorder.watch`` notes them as the batches come out."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from prunekit.errors import UsageError


class Loaders:
    """The loaders of one recording; one is watched once, however often the loop begins with it anew, and keeps its workers.

    Args:
        note: called with the indices of every batch.
        processes: how many record together, and note what each of them sees.
    """

    def __init__(self, note: Callable[[list[int]], None], processes: int) -> None:
        self._note, self._processes = note, processes
        self._known: dict[int, WatchedLoader] = {}

    def watched(self, loader: DataLoader[Any]) -> WatchedLoader:
        """See ``Recorder.watch``."""
        if id(loader) not in self._known:
            samplers: list[Any] = [
                getattr(loader, "sampler", None),
                getattr(getattr(loader, "batch_sampler", None), "sampler", None),
            ]
            dealt = next((one.num_replicas for one in samplers if hasattr(one, "num_replicas")), self._processes)
            if dealt != self._processes:
                raise UsageError(
                    f"Recorder.watch: the sampler deals samples out to {dealt} processes, and {self._processes} record together; "
                    "make a Recorder in every process, without alone=True, after torch.distributed has begun"
                )
            new = WatchedLoader(loader, self._note)
            if other := next((w.loader.dataset for w in self._known.values() if w.loader.dataset is not loader.dataset), None):
                raise UsageError(
                    f"Recorder.watch: loaders of two data sets ({type(other).__name__}, {type(loader.dataset).__name__}), whose "
                    "indices cannot be told apart; join the data sets, or note indices with recorder.batch(indices)"
                )
            self._known[id(loader)] = new
        return self._known[id(loader)]

    def forget(self) -> None:
        """Lets the loaders go, and with them their workers: they end at once where their loop lets them go too."""
        self._known.clear()


class WatchedLoader:
    """Gives what ``loader`` gives, and tells which samples each batch holds just before it comes out.

    Where it has workers, it draws batches ahead and gives them in the order in which it drew them; so the indices wait in that
    order too. It is copied, with the same data set and sampler, so that its own iteration stays as it is.

    Args:
        note: called with the indices of every batch.

    Raises:
        UsageError: its samples have no indices.
    """

    def __init__(self, loader: DataLoader[Any], note: Callable[[list[int]], None]) -> None:
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
        self._drawn = _Drawn(getattr(loader, where))
        vars(self._copy)[where] = self._drawn  # a loader lets nobody set it, and every kind of loader can be copied
        vars(self._copy)["_iterator"] = None  # the workers that it keeps are its own

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self._noted(iter(self._copy))

    def _noted(self, batches: Iterator[Any]) -> Iterator[Any]:
        waiting: deque[list[int]] | None = None
        for batch in batches:
            waiting = self._drawn.waiting if waiting is None else waiting
            self._note(waiting.popleft())
            yield batch


class _Drawn:
    """A sampler, of batches or of single samples, that keeps what was drawn until it comes out.

    Attributes:
        waiting: what the last iteration that began has drawn, oldest first.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.waiting: deque[list[int]] = deque()

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        waiting = self.waiting = deque()
        for drawn in self._sampler:
            waiting.append(_indices(drawn))
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
