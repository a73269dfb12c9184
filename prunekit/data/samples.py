"""Samples in batches, fetched anew whenever they are looked at, and never joined: however many there are, one batch is held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Batch, joined, size, taken
from prunekit.errors import UsageError

EVAL_BATCH = 256
Fetch = Callable[[Sequence[int]], Batch]


class Samples:
    """Batches ``(inputs, labels)`` by index: ``for inputs, labels in samples`` as often as one likes.

    Args:
        fetch: the batch of the samples at some indices, in their order.
        groups: the indices of every batch.
        digest: what identifies the samples; called when asked for.
        bytes_per_token: of texts, as they lie in files, where that is known.
    """

    def __init__(
        self,
        fetch: Fetch,
        groups: Sequence[Sequence[int]],
        digest: Callable[[], str] | None = None,
        bytes_per_token: float | None = None,
    ) -> None:
        self._fetch, self.groups, self._digest = fetch, [group for group in groups if len(group)], digest
        self.bytes_per_token = bytes_per_token

    def _some(self, groups: Sequence[Sequence[int]], digest: Callable[[], str] | None = None) -> Samples:
        """These of the same samples."""
        return Samples(self._fetch, groups, digest, self.bytes_per_token)

    def __len__(self) -> int:
        """How many samples."""
        return sum(len(group) for group in self.groups)

    def __iter__(self) -> Iterator[Batch]:
        for group in self.groups:
            yield self._fetch(group)

    def fetch(self, where: Sequence[int]) -> Batch:
        """The samples at these indices, which ``groups`` hold, as one batch."""
        return self._fetch(where)

    def batch(self, number: int) -> Batch:
        """One batch."""
        return self._fetch(self.groups[number])

    def rows(self, begin: int, end: int) -> Batch:
        """The samples ``begin`` to ``end`` of all, as one batch."""
        starts = [0, *accumulate(len(group) for group in self.groups)]
        parts = [
            group[max(begin - first, 0) : end - first]
            for group, first in zip(self.groups, starts, strict=False)
            if first < end and first + len(group) > begin
        ]
        if len(parts) == 1:
            return self._fetch(parts[0])
        return self._fetch([int(i) for part in parts for i in part])

    def take(self, where: Iterable[int], most: int = EVAL_BATCH) -> Samples:
        """Those at some places among these samples, ``most`` in a batch."""
        every = [int(i) for group in self.groups for i in group]
        chosen = [every[int(i)] for i in where]
        return self._some(_in_groups(chosen, most))

    def first(self, count: int | None) -> Samples:
        """At most the first ``count``."""
        if count is None or count >= len(self):
            return self
        left, groups = count, []
        for group in self.groups:
            groups.append(group[:left])
            left = max(0, left - len(group))
        return self._some(groups)

    def where(self, mask: Tensor) -> Samples:
        """Those where ``mask`` ``(samples,)`` is True, batch by batch."""
        groups, begin = [], 0
        for group in self.groups:
            here = mask[begin : begin + len(group)].tolist()
            begin += len(group)
            groups.append([int(i) for i, wanted in zip(group, here, strict=True) if wanted])
        return self._some(groups)

    def bounded(self, most: int) -> Samples:
        """The same, at most ``most`` in a batch."""
        return self._some([part for group in self.groups for part in _in_groups(group, most)], self._digest)

    def shared(self) -> Samples:
        """Of every batch this rank's stretch (``prunekit.ranks``); a process alone has them all."""
        if ranks.size() == 1:
            return self
        return self._some([group[own.start : own.stop] for group in self.groups if (own := ranks.stretch(len(group)))])

    def dealt(self) -> Samples:
        """Every so many of the batches, whole, this rank's (``prunekit.ranks``); a process alone has them all."""
        return self._some(ranks.dealt(self.groups), self._digest if ranks.size() == 1 else None)

    def beside(self, rows: Tensor) -> Samples:
        """The same samples with ``rows`` ``(samples, ...)`` beside their labels: ``(inputs, (labels, rows))``."""
        every = [int(i) for group in self.groups for i in group]
        starts = [0, *accumulate(len(group) for group in self.groups)]

        def fetch(where: Sequence[int]) -> Batch:
            inputs, labels = self._fetch([every[i] for i in where])
            return inputs, (labels, rows[torch.as_tensor(list(where))])

        return Samples(fetch, [range(starts[n], starts[n + 1]) for n in range(len(self.groups))])

    def digest(self) -> str:
        """Identifies the samples, labels included.

        Raises:
            UsageError: they are part of others and have no identity of their own.
        """
        if self._digest is None:
            from prunekit.data.identity import digest_of

            return digest_of(self)
        return self._digest()

    @classmethod
    def of(cls, source: Any, normal: Callable[[Any], Batch], most: int = EVAL_BATCH) -> Samples:
        """Of a loader, a data set, or an iterable of batches.

        A ``DataLoader`` over a map-style data set and a data set are read again whenever they are looked at; an iterable of
        batches is held in memory.

        Args:
            normal: makes ``(inputs, labels)`` of what the source gives, see ``prunekit.task.Task.batch``.
            most: samples in a batch, where the source has none of its own.

        Raises:
            UsageError: the source holds no batch, or is none.
        """
        from prunekit.data.splits import Split, is_dataset, is_loader

        if isinstance(source, Samples):
            return source
        if isinstance(source, Split) or is_loader(source) or is_dataset(source):
            return (source if isinstance(source, Split) else Split(source, normal)).samples(most)
        if not isinstance(source, Iterable):
            raise UsageError(f"batches are {type(source).__name__}; give a data set, a DataLoader, or batches (inputs, labels)")
        if isinstance(source, Mapping) or (isinstance(source, tuple) and len(source) == 2 and all(map(_is_tensor, source))):
            raise UsageError(f"batches are one batch (a {type(source).__name__}); put it into a list: [batch]")
        return cls.held([normal(given) for given in source])

    @classmethod
    def held(cls, batches: Sequence[Batch]) -> Samples:
        """Of batches in memory, with their own limits."""
        sizes = [size(inputs) for inputs, _ in batches]
        starts = [0, *accumulate(sizes)]

        def fetch(where: Sequence[int]) -> Batch:
            first = where[0]
            number = max(n for n, start in enumerate(starts[:-1]) if start <= first)
            if first == starts[number] and len(where) == sizes[number] and where[-1] == starts[number + 1] - 1:
                return batches[number]
            found, places = [], []
            for number, start in enumerate(starts[:-1]):
                here = [place for place, i in enumerate(where) if start <= i < start + sizes[number]]
                if here:
                    found.append(taken(batches[number], [where[place] - start for place in here]))
                    places += here
            if len(found) == 1:
                return found[0]
            counts = [size(inputs) for inputs, _ in found]
            whole = joined([inputs for inputs, _ in found], counts), joined([labels for _, labels in found], counts)
            order = sorted(range(len(places)), key=places.__getitem__)
            return whole if places == sorted(places) else taken(whole, order)

        return cls(fetch, [range(starts[n], starts[n + 1]) for n in range(len(sizes))])


def _in_groups(indices: Sequence[int], most: int) -> list[Sequence[int]]:
    return [indices[begin : begin + most] for begin in range(0, len(indices), most)]


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, Tensor)


def learn_and_accept(samples: Samples, accept: Samples | None, apart: Tensor, who: str) -> tuple[Samples, Samples]:
    """What is learnt from, and what that is judged on, at most ``EVAL_BATCH`` in a batch.

    Args:
        accept: samples of their own to judge on; without them those of ``samples`` where ``apart`` ``(samples,)`` is True.
        who: asks, for the message.

    Raises:
        UsageError: one of the parts has no sample.
    """
    parts = (samples, accept) if accept is not None else (samples.where(~apart), samples.where(apart))
    learn, judged = (part.bounded(EVAL_BATCH) for part in parts)
    if not len(learn) or not len(judged):
        raise UsageError(
            f"{who} needs samples to learn from and samples to accept on, one of each at least; it got {len(learn)} and "
            f"{len(judged)}"
        )
    return learn, judged


def drawn(samples: Samples, share: float, seed: int) -> Tensor:
    """``share`` of the samples, one at least and not all, drawn at random: bool ``(samples,)``."""
    total = len(samples)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    found = torch.zeros(total, dtype=torch.bool)
    found[order[: min(max(1, round(share * total)), total - 1)]] = True
    return found
