"""What several rules of operations share: how labels meet, and what a rule may ask of the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekit.structure.labels import GIVEN, Layers, Slots, given, support, united_along


class Reading(Protocol):
    """What rules need of a trace: the slots, axes that became several, the operation's name, tensors by their parts."""

    slots: Slots
    splits: list[Tensor]
    operation: str
    sliced: Any

    def of(self, tensor: Any) -> Layers: ...
    def put(self, tensor: Tensor, layers: Layers) -> None: ...
    def where(self) -> str: ...


def joined(trace: Reading, operands: Sequence[tuple[Layers, tuple[int, ...]]], shape: tuple[int, ...]) -> Layers:
    """Layers of a result in which elements at the same place meet."""
    why = f"{trace.where()} joins its channels with what the model is given, or with what cannot be read"
    found: Layers = []
    fixed: set[int] = set()
    for layers, size in operands:
        if len(size) > len(shape):
            continue
        for layer in layers:
            if is_given(layer):
                fixed |= {a + len(shape) - len(size) for a, n in enumerate(size) if n > 1}
                continue
            layer = layer.expand(shape)
            for other in [o for o in found if support(o) & support(layer)]:
                trace.slots.unite(other, layer, why)
                found = [o for o in found if o is not other]
                layer = torch.maximum(*_small(other, layer)).expand(shape)
            found.append(layer)
    for layer in found:
        if support(layer) & fixed:
            trace.slots.hold(layer, why)
    return found or (given(shape) if fixed else [])


def _small(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the size that either needs."""
    for axis in range(first.dim()):
        if axis not in support(first) | support(second) and first.shape[axis] > 1:
            first, second = first.narrow(axis, 0, 1), second.narrow(axis, 0, 1)
    return first, second


def is_given(layer: Tensor) -> bool:
    return not support(layer) and bool(layer.flatten()[0] == GIVEN) if layer.numel() else True


def by_channel(trace: Reading, tensor: Tensor, axis: int) -> Tensor | None:
    """Labels along one axis, ``(size,)``; what varies along others is united along them. None when there are none."""
    found: Tensor | None = None
    others = [a for a in range(tensor.dim()) if a != axis]
    for layer in trace.of(tensor):
        if axis in support(layer):
            flat = united_along(trace.slots, layer, others, f"{trace.where()} mixes places").flatten()
            if found is not None:
                trace.slots.unite(found, flat, trace.where())
            found = flat
        elif support(layer) - {0, 1} and not is_given(layer):
            trace.slots.hold(layer, f"{trace.where()} mixes places")
    return found
