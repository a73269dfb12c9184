"""What identifies samples: a hash of all of them. A sample of the samples never stands for the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.batch import Batch, named, size
from prunekit.errors import UsageError
from prunekit.progress import track

if TYPE_CHECKING:
    from prunekit.data.samples import Samples


def tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch's tensors by name: ``x`` and ``y`` of a pair of tensors, else dotted paths."""
    inputs, labels = batch
    return {**named(inputs, "x"), **named(labels, "y")}


def digest_of_tensors(batch: Batch, facts: dict[str, Any] | None = None) -> str:
    """Of samples that lie in memory as one batch."""
    return checkpoint.digest(tensors(batch), facts)


def digest_of(samples: Samples) -> str:
    """Of samples that are fetched: one pass over all of them, however they are cut into batches.

    Where every batch's tensors fit one another and those after the first (the labels, of a pair) take no more than ``HELD``
    bytes, it is the digest of the samples as one batch. Else it is one of batches; what was read until that showed is read again.
    """
    return _as_one(samples) or _of_batches(samples)


HELD = 16 * 2**20  # bytes of labels, and of other tensors after the first, that are held to be hashed last


def _as_one(samples: Samples) -> str | None:
    """The digest of the samples as one batch; None where they are none, or too many tensors would have to be held."""
    first, like = "", dict[str, Tensor]()
    whole = hashlib.sha256()
    after: dict[str, bytearray] = {}  # not tensors: many small ones among large passing ones scatter the heap
    for batch in _read(samples):
        found = _tensors(batch)
        if not like:
            first, like = min(found), found
            whole.update(checkpoint.heading(first, found[first].dtype, (len(samples), *found[first].shape[1:])))
            after = {name: bytearray() for name in sorted(found) if name != first}
        if found.keys() != like.keys() or not all(_fits(found[name], like[name], size(batch[0])) for name in found):
            return None
        whole.update(checkpoint.raw(found[first]))
        for name, part in after.items():
            part.extend(checkpoint.raw(found[name]))
        if sum(map(len, after.values())) > HELD:
            return None
    for name, part in after.items():
        whole.update(checkpoint.heading(name, like[name].dtype, (len(samples), *like[name].shape[1:])))
        whole.update(part)
    return whole.hexdigest()[:32]


def _of_batches(samples: Samples) -> str:
    """A digest of every tensor's bytes and of the shapes that they come in."""
    hashes: dict[str, Any] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    types: dict[str, torch.dtype] = {}
    for batch in _read(samples):
        for name, tensor in _tensors(batch).items():
            if name not in hashes:
                hashes[name], shapes[name], types[name] = hashlib.sha256(), [], tensor.dtype
            hashes[name].update(checkpoint.raw(tensor))
            shapes[name].append((size(batch[0]), *tensor.shape))
    told = {name: [hashes[name].hexdigest(), str(types[name]), shapes[name]] for name in sorted(hashes)}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _read(samples: Samples) -> Iterable[Batch]:
    """Every batch; a progress bar is shown where there are many."""
    count = len(samples.groups)
    return track(samples, "reading data (batches)", count) if count > 1 else samples


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors(batch).items()}


def _fits(tensor: Tensor, like: Tensor, samples: int) -> bool:
    """Whether a batch's tensor can be joined to the first batch's."""
    return tensor.dim() > 0 and len(tensor) == samples and tensor.dtype == like.dtype and tensor.shape[1:] == like.shape[1:]


def check_same_twice(first: Batch, again: Batch) -> None:
    """Raises UsageError when the same samples read twice are not the same."""
    a, b = tensors(first), tensors(again)
    for name, tensor in a.items():
        other = b.get(name)
        if other is None or other.shape != tensor.shape or not torch.equal(tensor.nan_to_num(), other.nan_to_num()):
            raise UsageError(
                f"data: {name} differs when the same samples are read twice; random changes belong into train.augment"
            )
