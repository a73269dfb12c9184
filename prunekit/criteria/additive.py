"""From signed per-sample scores to what a score file holds, chunk by chunk, going on where an earlier try stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import checkpoint, durable, ranks
from prunekit.criteria.aggregations import AGGREGATIONS, Aggregation
from prunekit.criteria.scores import summed_axes
from prunekit.data.sharing import Share
from prunekit.errors import ArtifactError
from prunekit.kernel import Contribution, ModelFunction, attribute
from prunekit.kernel.attribution import chunks
from prunekit.trajectory import Layout, Segment

SECONDS_BETWEEN_SAVES = 10.0
AXES = 64 * 2**20  # bytes of axis sums that a score file holds; of more samples evenly spaced ones are kept


def contributions(
    function: ModelFunction,
    own: Share,
    targets: int,
    segments: Callable[[], Iterable[Segment]],
    skip: int,
    memory: int,
    **options: Any,
) -> Iterator[Contribution]:
    """``prunekit.kernel.attribute`` over a rank's samples that are fetched batch by batch, without the first ``skip`` chunks."""
    samples, begin = own
    element = torch.finfo(torch.float32).bits // 8
    for number, group in enumerate(samples.groups):
        here = len(chunks(len(group), targets, function.layout.total * element, memory))
        if skip < here:
            for part in attribute(function, segments, *samples.batch(number), memory=memory, skip=skip, **options):
                where = slice(begin + part.samples.start, begin + part.samples.stop)
                yield Contribution(where, part.targets, part.scores)
        skip, begin = max(0, skip - here), begin + len(group)


@dataclass
class Collected:
    """Running sums over chunks; every aggregation is a function of something that adds up.

    ``sums``: per prunable parameter, of what the aggregation adds up (``Aggregation.each``), float64; ``axes``: signed axis sums
    of every chunk, in order; ``count``: samples × targets; ``chunks``: how many are in; ``spacing``: every ``spacing``-th sample
    has their axis sums kept (0 before any chunk).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    chunks: int = 0
    spacing: int = 0


def collect(
    contributions: Callable[[int], Iterable[Contribution]],
    shape: tuple[int, int],
    prunable: tuple[str, ...],
    aggregation: str,
    partial: Path | None = None,
    made_from: dict[str, Any] | None = None,
    spacing: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Aggregates signed scores to importances and keeps their exact sums along their ``summed_axes``.

    Args:
        contributions: ``contributions(skip)`` gives the chunks after the first ``skip``, in order; a chunk may be of some
            parameters alone.
        shape: ``(samples, targets)`` in all.
        partial: where finished chunks are kept while the work goes on; removed at the end.
        made_from: what they are made from; kept chunks of something else are ignored.
        spacing: every so many samples have their axis sums kept; 0: the first chunk, then of all parameters, tells.

    Returns:
        of all ranks together: importance of the prunable parameters, and ``<param>@<axis>`` -> ``(samples, targets, axis size)``
        of all parameters; of samples whose sums would take more than ``AXES`` bytes, every second, third … alone.
    """
    if partial is not None and (team := ranks.met()) is not None:  # each rank keeps its own
        partial = partial.with_suffix(f".{team.rank}-of-{team.size}{partial.suffix}")
    so_far = _load(partial, made_from)
    so_far.spacing = so_far.spacing or spacing
    saved = time.monotonic()
    for part in contributions(so_far.chunks):
        _add(so_far, part, shape, prunable, aggregation)
        if partial is not None and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            _save(partial, so_far, made_from)
            saved = time.monotonic()
    ranks.add_up([*so_far.sums.values(), *so_far.axes.values()])
    so_far.count = int(ranks.total(so_far.count))
    if partial is not None:
        with ranks.apart():
            durable.remove(partial)
    finish = AGGREGATIONS[aggregation].finish
    along = next(iter(so_far.axes.values()), None)  # its precision is the scores' own
    importance = {}
    for name in list(so_far.sums):
        found = finish(so_far.sums.pop(name), so_far.count)
        importance[name] = found if along is None else found.to(along.dtype)
    return importance, so_far.axes


def _spacing(part: Contribution, shape: tuple[int, int]) -> int:
    """Every how many samples axis sums are kept."""
    each = sum(signed.element_size() * _kept(signed.shape[2:]) for signed in part.scores.values())
    return max(1, -(-each * shape[0] * shape[1] // AXES))


def spacing_of(layout: Layout, number: int, samples: int) -> int:
    """The same of all parameters and one target, before there is a chunk; ``number``: bytes of a score."""
    return max(1, -(-number * sum(_kept(entry.shape) for entry in layout.parameters) * samples // AXES))


def _kept(shape: Sequence[int]) -> int:
    return sum(shape[axis] for axis in summed_axes(len(shape)))


def _add(so_far: Collected, part: Contribution, shape: tuple[int, int], prunable: tuple[str, ...], aggregation: str) -> None:
    if not so_far.spacing:
        so_far.spacing = _spacing(part, shape)
    spacing = so_far.spacing
    first = -part.samples.start % spacing  # of this chunk, the first sample that is kept
    rows = slice((part.samples.start + first) // spacing, (part.samples.stop - 1) // spacing + 1)
    for name, signed in part.scores.items():
        if name in prunable:
            found = _summed(AGGREGATIONS[aggregation], signed)
            so_far.sums[name] = so_far.sums[name] + found if name in so_far.sums else found
        dims = list(range(2, signed.dim()))
        for axis in [dims[a] for a in summed_axes(len(dims))]:
            others = [d for d in dims if d != axis]
            along = (signed.sum(others) if others else signed).cpu()
            key = f"{name}@{axis - 2}"
            if key not in so_far.axes:
                so_far.axes[key] = along.new_zeros(-(-shape[0] // spacing), shape[1], along.shape[2])
            so_far.axes[key][rows, part.targets] = along[first::spacing]
    if prunable[0] in part.scores:
        so_far.count += part.scores[prunable[0]].shape[:2].numel()
    so_far.chunks += 1


def _summed(aggregation: Aggregation, signed: Tensor) -> Tensor:
    """What adds up, over samples and targets, in float64: equal weights stay equal, however samples are cut into chunks."""
    precision = torch.float32 if signed.device.type == "mps" else torch.float64
    total = torch.zeros(signed.shape[2:], dtype=precision, device=signed.device)
    for sample in signed:  # one at a time stays in the cache
        total += aggregation.each(sample).sum(0, dtype=precision)
    return total.cpu().double()


def _save(partial: Path, so_far: Collected, made_from: dict[str, Any] | None) -> None:
    tensors = {f"sum|{k}": v for k, v in so_far.sums.items()} | {f"axis|{k}": v for k, v in so_far.axes.items()}
    header = {
        "kind": "partial scores",
        "made_from": made_from,
        "count": so_far.count,
        "chunks": so_far.chunks,
        "spacing": so_far.spacing,
    }
    with ranks.apart():
        checkpoint.write_tensors(partial, tensors, header)


def _load(partial: Path | None, made_from: dict[str, Any] | None) -> Collected:
    if partial is None or not partial.exists():
        return Collected()
    try:
        header = checkpoint.read_header(partial, "partial scores")
        tensors = checkpoint.read_tensors(partial)
    except ArtifactError:
        return Collected()  # a leftover that cannot be read only costs the work again
    if header["made_from"] != made_from:
        return Collected()
    sums = {k.removeprefix("sum|"): v for k, v in tensors.items() if k.startswith("sum|")}
    axes = {k.removeprefix("axis|"): v for k, v in tensors.items() if k.startswith("axis|")}
    return Collected(sums, axes, header["count"], header["chunks"], header.get("spacing", 1))
