"""Training, validation, test and scoring samples, addressed by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, default_collate

from prunekit import checkpoint
from prunekit.batch import Batch, described, leaves, named, size, taken
from prunekit.data.identity import check_same_twice, digest_of, digest_of_tensors
from prunekit.data.samples import EVAL_BATCH, Samples
from prunekit.errors import UsageError, theirs

SPLITS = ("train", "validation", "test", "scoring")
"""What each is for: learning; every choice (compare, auto); the final figures; scores. They must be disjoint."""
EXTRAS = ("collate", "fingerprint", "decode", "bytes_per_token", "stride")
"""What a data factory may return beside the splits."""
Normal = Callable[[Any], Batch]


def pair(given: Any) -> Batch:
    """The batch ``(inputs, labels)`` of a pair."""
    return given[0], given[1]


class Split:
    """One set of samples: tensors that have one row a sample, a map-style data set, or a ``DataLoader`` over one.

    Args:
        source: ``(inputs, labels)`` or a mapping of the model's arguments with labels among them, all of tensors with samples on
            the first axis; or a data set with ``len`` and indexing (``torch.utils.data``, ``datasets.Dataset``); or a loader,
            whose data set and ``collate_fn`` are taken; with ``collate`` also a list of items.
        normal: makes ``(inputs, labels)`` of what collating gives, see ``prunekit.task.Task.batch``.
        collate: makes a batch of a list of items; torch's own when None.
        fingerprint: stands for the samples' content where hashing all of them takes too long. It must change when they do.
        decode: token numbers to their texts, one a token, for pages on text.
        bytes_per_token: of the text that the labels ask for, for bits a byte.
        stride: tokens between the beginnings of neighbouring windows of a text, to be told with figures.

    Raises:
        UsageError: it is none of these, or empty.
    """

    def __init__(
        self,
        source: Any,
        normal: Normal = pair,
        collate: Callable[[list[Any]], Any] | None = None,
        fingerprint: str | None = None,
        decode: Callable[[Sequence[int]], Sequence[str]] | None = None,
        bytes_per_token: float | None = None,
        stride: int | None = None,
    ) -> None:
        self.bytes_per_token, self._stride = bytes_per_token, stride
        self.normal, self.fingerprint, self.decode = normal, fingerprint, decode
        self._order: list[int] | None = None
        if is_loader(source):
            collate = collate or source.collate_fn
            self._order = _order(source)
            source = source.dataset
        self.collate = collate or collate_items
        self.held: Batch | None = None
        if collate is None and _in_memory(source):
            self.held = normal(source)
            self._check_held(self.held)
        elif not is_dataset(source) and not (isinstance(source, list) and collate is not None):
            raise UsageError(
                f"data: a split must be (inputs, labels), a mapping of tensors, or a map-style dataset, not "
                f"{type(source).__name__}"
            )
        self._source = source
        if not getattr(source, "filled", False) and len(self) == 0:  # counting tokens is left until somebody asks
            raise UsageError("data: a split is empty")

    def _check_held(self, held: Batch) -> None:
        inputs, labels = held
        found = [*leaves(inputs), *leaves(labels)]
        if any(t.dim() == 0 or len(t) != len(found[0]) for t in found):
            raise UsageError(f"data: inputs {described(inputs)} and labels {described(labels)} are not one each a sample")

    @property
    def source(self) -> Any:
        """The data set that samples come from; the tensors themselves where they lie in memory."""
        return self._source

    @property
    def stride(self) -> int | None:
        """Tokens between the beginnings of neighbouring windows of a text, where its data set or factory says it."""
        return self._stride if self._stride is not None else getattr(self._source, "stride", None)

    @property
    def notes(self) -> list[str]:
        """What its data set has to say to the user."""
        return list(getattr(self._source, "notes", ()))

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and labels, where they are one tensor each and lie in memory."""
        if self.held is not None and isinstance(self.held[0], Tensor) and isinstance(self.held[1], Tensor):
            return self.held[0], self.held[1]
        return None

    def __len__(self) -> int:
        if self.held is not None:
            return size(self.held[0])
        return len(self._source) if self._order is None else len(self._order)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``(inputs, labels)`` of the samples at ``indices``, in that order.

        Raises:
            UsageError: the data set or its collating fails, or does not give as many samples.
        """
        if self.held is not None:
            return taken(self.held, torch.as_tensor(indices))
        where = [int(i) if self._order is None else self._order[int(i)] for i in indices]
        with theirs(f"data: reading samples {where[:3]}…"):
            found = self.normal(self.collate([self._source[i] for i in where]))
        _check(found, len(where))
        return found

    def samples(self, most: int = EVAL_BATCH) -> Samples:
        """All of them, ``most`` in a batch, fetched when they are looked at."""
        groups = [range(begin, min(begin + most, len(self))) for begin in range(0, len(self), most)]
        held = self.held
        known = (
            (lambda: digest_of_tensors(held)) if held is not None else self.digest if self._fingerprint() is not None else None
        )
        return Samples(self.batch, groups, known, getattr(self._source, "bytes_per_token", None))

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The samples in order, ``size`` at a time, at most ``limit`` of them."""
        yield from self.samples(size).first(limit)

    @property
    def identity(self) -> str:
        """How ``digest`` knows the samples: ``content`` (all are hashed) or ``fingerprint`` (the user's, or the data set's)."""
        return "content" if self._fingerprint() is None else "fingerprint"

    def _fingerprint(self) -> str | None:
        return self.fingerprint if self.held is None else None

    def same_as(self, other: Split) -> bool:
        """Whether it is seen at once that both are the same samples: one object, or tensors of equal values."""
        if self._source is other._source:
            return self._order == other._order
        held = self.held is not None and other.held is not None and len(self) == len(other)
        return held and self.digest() == other.digest()

    def digest(self) -> str:
        """Identifies the samples: a hash of them all, or of the fingerprint that stands for them.

        Raises:
            UsageError: the data set gives other samples when it is read twice.
        """
        if self.held is not None:
            return digest_of_tensors(self.held, {"samples": len(self)})
        mark = self._fingerprint()
        if mark is not None:
            return checkpoint.digest({}, {"fingerprint": mark, "samples": len(self)})
        few = range(min(4, len(self)))
        check_same_twice(self.batch(few), self.batch(few))
        return digest_of(self.samples())


def as_splits(found: Any, factory: str, normal: Normal = pair) -> dict[str, Split]:
    """Checks what a data factory returned: a mapping with the four ``SPLITS``, and perhaps some of ``EXTRAS``.

    Raises:
        UsageError: names the missing split or the unfit value.
    """
    if not isinstance(found, Mapping):
        raise UsageError(f"{factory}: must return a mapping of splits ({', '.join(SPLITS)}), got {type(found).__name__}")
    missing = [name for name in SPLITS if name not in found]
    if missing:
        raise UsageError(f"{factory}: lacks the splits {', '.join(missing)}; it has {', '.join(map(str, found))}")
    collate, mark = found.get("collate"), found.get("fingerprint")
    if collate is not None and not callable(collate):
        raise UsageError(f"{factory}: collate is {type(collate).__name__}; it must make a batch of a list of items")
    if mark is not None and not isinstance(mark, str):
        raise UsageError(f"{factory}: fingerprint is {type(mark).__name__}; it must be text that changes when the data do")
    decode = found.get("decode")
    if decode is not None and not callable(decode):
        raise UsageError(f"{factory}: decode is {type(decode).__name__}; it must give the text of each token of a list")
    share = found.get("bytes_per_token")
    if share is not None and not (isinstance(share, int | float) and share > 0):
        raise UsageError(f"{factory}: bytes_per_token is {share!r}; it must be a number above 0")
    stride = found.get("stride")
    if stride is not None and not (type(stride) is int and stride > 0):
        raise UsageError(f"{factory}: stride is {stride!r}; it must be a whole number of tokens above 0")
    return {
        name: Split(found[name], normal, collate, None if mark is None else f"{name}|{mark}", decode, share, stride)
        for name in SPLITS
    }


def is_loader(source: Any) -> bool:
    """Whether it is a ``DataLoader`` whose samples can be fetched by index."""
    return isinstance(source, DataLoader) and is_dataset(source.dataset)


def is_dataset(source: Any) -> bool:
    """Whether it has samples by index: ``len`` and ``[]``, and is no plain container."""
    plain = isinstance(source, str | bytes | Mapping | list | tuple | Tensor)
    return not plain and hasattr(source, "__len__") and hasattr(source, "__getitem__")


def _order(loader: DataLoader[Any]) -> list[int] | None:
    """Which samples a loader gives; None for all.

    Raises:
        UsageError: that is not settled: samples come more than once, or others whenever it is asked.
    """
    own_batches = loader.batch_sampler if type(loader.batch_sampler) not in (BatchSampler, type(None)) else None
    sampler = loader.sampler
    if own_batches is None and type(sampler) is SequentialSampler:
        return None
    if own_batches is None and type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return None

    def drawn() -> list[int]:
        with torch.random.fork_rng(devices=[]):
            if own_batches is not None:
                return sorted(int(i) for group in own_batches for i in group)
            return sorted(int(i) for i in sampler)

    first = drawn()
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(torch.initial_seed() + 1)
    second = drawn()
    torch.random.set_rng_state(torch_state)
    if len(set(first)) != len(first) or first != second:
        name = type(sampler if own_batches is None else own_batches).__name__
        raise UsageError(
            f"data: the loader's {name} gives samples more than once, or others each time; give the data set itself, and put "
            "weights of samples into the loss"
        )
    return None if first == list(range(len(loader.dataset))) else first  # type: ignore[arg-type]


def _in_memory(source: Any) -> bool:
    """Whether it is a nest of tensors, ``(inputs, labels)`` or a mapping."""
    if isinstance(source, Mapping):
        return bool(source) and all(isinstance(value, Tensor) for value in source.values())
    if isinstance(source, tuple | list) and len(source) == 2:
        return (isinstance(source, tuple) and _all_tensors(source[0]) and _all_tensors(source[1])) or all(
            isinstance(part, Tensor) for part in source
        )
    return False


def _all_tensors(nest: Any) -> bool:
    if isinstance(nest, Tensor) or nest is None:
        return True
    if isinstance(nest, Mapping):
        return bool(nest) and all(map(_all_tensors, nest.values()))
    return isinstance(nest, tuple | list) and bool(nest) and all(map(_all_tensors, nest))


def collate_items(items: list[Any]) -> Any:
    """A batch of items, as torch collates them; lists of numbers in a mapping become tensors first.

    Raises:
        UsageError: an item holds text, or lists of different lengths.
    """
    first = items[0]
    if not isinstance(first, Mapping):
        return default_collate(items)
    batch: dict[str, Tensor] = {}
    for key in first:
        column = [item[key] for item in items]
        if isinstance(column[0], str | bytes | None.__class__):
            raise UsageError(
                f"data: column {key!r} holds {type(column[0]).__name__}; leave it out (remove_columns), or give collate"
            )
        values = [torch.as_tensor(value) for value in column]
        if len({value.shape for value in values}) > 1:
            raise UsageError(f"data: column {key!r} has rows of different lengths; give a collate that pads them")
        batch[key] = torch.stack(values)
    return batch


def _check(found: Batch, samples: int) -> None:
    inputs, labels = found
    if not named(inputs):
        raise UsageError(f"data: a batch's inputs are {type(inputs).__name__}, without a tensor")
    if size(inputs) != samples:
        raise UsageError(f"data: collating {samples} samples gave inputs {described(inputs)}")
    for tensor in leaves(labels):
        if tensor.dim() and len(tensor) != samples:
            raise UsageError(f"data: collating {samples} samples gave labels {described(labels)}")
