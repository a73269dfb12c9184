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

    Where every batch's tensors fit one another, it is the digest of the samples as one batch.
    """
    return digest_of_batches(samples, len(samples.groups))


def digest_of_batches(batches: Iterable[Batch], count: int) -> str:
    """See ``digest_of``; a progress bar is shown where there are many batches."""
    hashes: dict[str, Any] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    types: dict[str, torch.dtype] = {}
    every = track(batches, "reading data (batches)", count) if count > 1 else batches
    small: list[dict[str, Tensor]] = []
    held = 0
    for batch in every:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors(batch).items()}
        if held <= HELD:
            held += sum(t.numel() * t.element_size() for t in found.values())
            small.append(found)
        for name, tensor in found.items():
            if name not in hashes:
                hashes[name], shapes[name], types[name] = hashlib.sha256(), [], tensor.dtype
            hashes[name].update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            shapes[name].append((size(batch[0]), *tensor.shape))
    if held <= HELD and small and all(part.keys() == small[0].keys() for part in small):
        try:
            return checkpoint.digest({name: torch.cat([part[name] for part in small]) for name in small[0]})
        except RuntimeError:  # batches of different widths: they are no one batch
            pass
    told = {name: [hashes[name].hexdigest(), str(types[name]), shapes[name]] for name in sorted(hashes)}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


HELD = 64 * 2**20  # bytes: samples that take no more are hashed as one batch, whatever its limits were


def check_same_twice(first: Batch, again: Batch) -> None:
    """Raises UsageError when the same samples read twice are not the same."""
    a, b = tensors(first), tensors(again)
    for name, tensor in a.items():
        other = b.get(name)
        if other is None or other.shape != tensor.shape or not torch.equal(tensor.nan_to_num(), other.nan_to_num()):
            raise UsageError(
                f"data: {name} differs when the same samples are read twice; random changes belong into train.augment"
            )
