"""What identifies samples: a hash of all of them. A sample of the samples never stands for the whole."""

from __future__ import annotations

import hashlib
import json
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
    bytes, it is the digest of the samples as one batch. A progress bar is shown where there are many batches.
    """
    rows, count = len(samples), len(samples.groups)
    hashes: dict[str, Any] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    types: dict[str, torch.dtype] = {}
    first, whole = "", hashlib.sha256()
    after: dict[str, bytearray] | None = None  # not tensors: many small ones among large passing ones scatter the heap
    for batch in track(samples, "reading data (batches)", count) if count > 1 else samples:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors(batch).items()}
        if not hashes:
            first = min(found)
            whole.update(checkpoint.heading(first, found[first].dtype, (rows, *found[first].shape[1:])))
            after = {name: bytearray() for name in found if name != first}
        for name, tensor in found.items():
            if name not in hashes:
                hashes[name], shapes[name], types[name] = hashlib.sha256(), [], tensor.dtype
            hashes[name].update(checkpoint.raw(tensor))
            shapes[name].append((size(batch[0]), *tensor.shape))
        if after is not None:
            fit = found.keys() == hashes.keys() and all(_fits(found[n], types[n], shapes[n], size(batch[0])) for n in found)
            if fit and sum(map(len, after.values())) <= HELD:
                whole.update(checkpoint.raw(found[first]))
                for name, part in after.items():
                    part.extend(checkpoint.raw(found[name]))
            else:
                after = None
    if after is not None:
        for name in sorted(after):
            whole.update(checkpoint.heading(name, types[name], (rows, *shapes[name][0][2:])))
            whole.update(after[name])
        return whole.hexdigest()[:32]
    told = {name: [hashes[name].hexdigest(), str(types[name]), shapes[name]] for name in sorted(hashes)}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


HELD = 16 * 2**20  # bytes of labels, and of other tensors after the first, that are held to be hashed last


def _fits(tensor: Tensor, dtype: torch.dtype, shapes: list[tuple[int, ...]], samples: int) -> bool:
    """Whether a batch's tensor can be joined to those of the batches before it."""
    return tensor.dim() > 0 and len(tensor) == samples and tensor.dtype == dtype and shapes[0][2:] == tuple(tensor.shape[1:])


def check_same_twice(first: Batch, again: Batch) -> None:
    """Raises UsageError when the same samples read twice are not the same."""
    a, b = tensors(first), tensors(again)
    for name, tensor in a.items():
        other = b.get(name)
        if other is None or other.shape != tensor.shape or not torch.equal(tensor.nan_to_num(), other.nan_to_num()):
            raise UsageError(
                f"data: {name} differs when the same samples are read twice; random changes belong into train.augment"
            )
