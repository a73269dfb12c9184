"""Which coordinates of a model one process holds: all of them, or under FSDP2 (``fully_shard``) its rows of every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import UsageError
from prunekit.trajectory.bare import local, named_tensors
from prunekit.trajectory.layout import Layout

Span = tuple[int, int]
"""First coordinate and the one after the last, in the flat state ``(P,)``."""


@dataclass(frozen=True)
class Share:
    """What one process writes of a recording.

    Attributes:
        layout: its coordinates, packed; the shapes are those of its own rows.
        spans: where they lie in the whole flat state, in the same order.
        whole: the coordinates of all processes.
        sharded: whether the processes hold different coordinates, and each writes its own.
        writes: whether this process writes any file.
    """

    layout: Layout
    spans: tuple[Span, ...]
    whole: Layout
    sharded: bool
    writes: bool

    @classmethod
    def of(cls, model: nn.Module, layout: Layout, rank: int = 0, size: int = 1) -> Share:
        """The share of process ``rank`` of ``size`` in the coordinates of ``layout``.

        Tensors that are no DTensors are the same in all processes, and the first one writes them.

        Raises:
            UsageError: a tensor is spread over devices in another way than ``fully_shard`` does; names it.
        """
        named = named_tensors(model)
        spread = [name for name, tensor in named.items() if is_spread(tensor)]
        if not spread:
            return cls(layout, ((0, layout.total),), layout, False, rank == 0)
        for name in spread:
            _check(name, named[name], size)
        rows: list[tuple[str, tuple[int, ...], str]] = []
        spans: list[Span] = []
        for entry in layout:
            tensor = named[entry.name]
            if not is_spread(tensor) and entry.kind == "parameter":
                raise UsageError(
                    f"{entry.name} is trained and not sharded, though others are, so nothing averages its gradients over the "
                    "processes; call fully_shard on the whole model too"
                )
            first, count = owned_rows(tensor, rank)
            if count:
                width = entry.size // entry.shape[0] if entry.shape else 1
                shape = (count, *entry.shape[1:]) if is_spread(tensor) else entry.shape
                rows.append((entry.name, shape, entry.kind))
                begin = entry.offset + (first * width if is_spread(tensor) else 0)
                spans.append((begin, begin + count * width if is_spread(tensor) else entry.span.stop))
        return cls(Layout._packed(rows), _merged(spans), layout, True, True)

    @property
    def names(self) -> set[str]:
        """Of every recorded tensor, whoever writes it."""
        return {entry.name for entry in self.whole}

    def part_of(self, flat: Tensor) -> Tensor:
        """Its coordinates of a whole flat state."""
        return flat if not self.sharded else torch.cat([flat[b:e] for b, e in self.spans] or [flat[:0]])


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def owned_rows(tensor: Any, rank: int) -> tuple[int, int]:
    """First row and number of rows (axis 0) of ``tensor`` that this process writes; replicas are written once."""
    if not is_spread(tensor):
        return 0, (1 if rank == 0 else 0)
    where = tensor.device_mesh.get_coordinate()
    if any(where[axis] for axis, placement in enumerate(tensor.placements) if placement.is_replicate()):
        return 0, 0
    return held_rows(tensor)


def held_rows(tensor: Any) -> tuple[int, int]:
    """First row and number of rows of a DTensor that this process holds."""
    mesh = tensor.device_mesh
    axis = next((axis for axis, placement in enumerate(tensor.placements) if placement.is_shard()), None)
    count = tensor.shape[0] if tensor.dim() else 1
    if axis is None:
        return 0, count
    each = -(-count // mesh.size(axis))  # as torch.chunk deals out: the last ones have fewer, or none
    first = min(mesh.get_coordinate()[axis] * each, count)
    return first, min(each, count - first)


@torch.no_grad()
def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once; see ``checkpoint.unique_state``."""
    kept, _ = checkpoint.unique_state({name: local(tensor) for name, tensor in tensors.items()})
    return {name: tensors[name] for name in kept}


def shares(tensors: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What this process writes of ``tensors``: its own rows by name, and of what is spread ``[first row, rows of all]``."""
    found, places = {}, {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            first, count = owned_rows(tensor, rank)
            if count:
                found[name] = local(tensor)
                if is_spread(tensor):
                    places[name] = [first, tensor.shape[0] if tensor.dim() else 1]
    return found, places


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    found: list[Span] = []
    for begin, end in spans:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)


def _check(name: str, tensor: Any, size: int) -> None:
    """Raises UsageError where a DTensor does not lie as ``fully_shard`` puts it."""
    placements, mesh = tensor.placements, tensor.device_mesh
    sharded = [p for p in placements if not p.is_replicate()]
    if any(type(p).__name__ != "Shard" or p.dim != 0 for p in sharded) or len(sharded) > 1:
        raise UsageError(
            f"{name} is spread over devices as {', '.join(map(repr, placements))}; a recording takes the rows of fully_shard "
            "(Shard(0), also with replicas beside it), not tensor-parallel or other placements"
        )
    if mesh.size() != size:
        raise UsageError(
            f"{name} is spread over {mesh.size()} of {size} processes; a recording is of all the processes of one training"
        )
