"""Which places of which tensors belong together: labels that follow a model's numbers through its operations.

Every axis of every parameter and buffer has a *slot* per index, ``conv1.weight@0`` index 3 for example. A tensor carries
*layers* of labels: integers of its own shape that say which slot an element comes from. Labels of elements that an operation
joins are united; united slots leave together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

NOTHING = -1
"""A label that says nothing: a constant."""
GIVEN = 0
"""The label of what the model is given, and of what was computed in ways that are not read: it can never become shorter."""

Layers = list[Tensor]
"""Labels of one tensor, each of its shape (int64). Axes along which a layer does not vary are expanded, not stored."""


class Slots:
    """All slots and what is known of them: which are one, and which have to stay."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, str]] = [(0, "")]
        self._size = 1
        self._parent = np.zeros(1, dtype=np.int64)
        self._held: dict[int, str] = {}

    def axis(self, key: str, size: int) -> Tensor:
        """New slots, ``(size,)``, for what ``key`` names."""
        first, self._size = self._size, self._size + size
        self._ranges.append((first, key))
        if self._size > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self._size)])
        return torch.arange(first, self._size)

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """Of every label the one that stands for all that are united with it; ``NOTHING`` stays."""
        found = np.where(labels < 0, 0, labels)
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                return np.where(labels < 0, NOTHING, found)
            found = above

    def unite(self, first: Tensor, second: Tensor, why: str) -> None:
        """Makes labels at the same place one; next to ``GIVEN`` they have to stay, because of ``why``."""
        first, second = torch.broadcast_tensors(first, second)
        first, second = _stored(first), _stored(second)
        first, second = torch.broadcast_tensors(first, second)
        pairs = np.stack([self.roots(t.reshape(-1).numpy()) for t in (first, second)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs.min(0) >= 0)]
        if not pairs.size:
            return
        pairs = np.unique(pairs, axis=1)
        beside = pairs.min(0) == GIVEN
        self.hold(torch.from_numpy(pairs[:, beside].max(0)), why)
        for a, b in pairs[:, ~beside].T.tolist():
            a, b = self._root(a), self._root(b)
            if a != b:
                low, high = min(a, b), max(a, b)
                self._parent[high] = low
                if high in self._held:
                    self._held.setdefault(low, self._held[high])

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = label = int(self._parent[self._parent[label]])
        return label

    def hold(self, labels: Tensor, why: str) -> None:
        """These can never leave, because of ``why``; the last reason is kept, but an empty one never takes a place."""
        flat = self.roots(_stored(labels).reshape(-1).numpy())
        for root in np.unique(flat[flat > GIVEN]).tolist():
            if why and self._held.get(root) != "":
                self._held[root] = why
            self._held.setdefault(root, why)

    def units(self) -> Iterator[tuple[dict[str, list[int]], str | None]]:
        """Every set of slots that leave together, by key, and why it has to stay (None: it may go)."""
        roots = self.roots(np.arange(1, self._size))
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
        firsts = np.array([first for first, _ in self._ranges])
        for slots in np.split(order + 1, starts[1:]) if len(order) else ():
            members: dict[str, list[int]] = {}
            for number, slot in zip((np.searchsorted(firsts, slots, "right") - 1).tolist(), slots.tolist(), strict=True):
                first, key = self._ranges[number]
                members.setdefault(key, []).append(slot - first)
            yield members, self._held.get(int(roots[slots[0] - 1]))


def given(shape: Sequence[int]) -> Layers:
    """Layers of a tensor that can never become shorter."""
    return [torch.full((1,) * len(shape), GIVEN).expand(tuple(shape))]


def along(slots: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A layer that varies along one axis only."""
    return slots.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(tuple(shape))


def support(layer: Tensor) -> set[int]:
    """Axes along which a layer varies."""
    return {axis for axis in range(layer.dim()) if layer.shape[axis] > 1 and layer.stride(axis) != 0}


def tidy(layers: Iterable[Tensor]) -> Layers:
    """The same layers with axes expanded along which they turn out not to vary, without those that say nothing."""
    found = []
    for layer in layers:
        small = _stored(layer)
        for axis in sorted(support(layer)):
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
        if small.numel() and bool((small != NOTHING).any()):
            found.append(small.expand(layer.shape))
    return found


def united_along(slots: Slots, layer: Tensor, axes: Iterable[int], why: str) -> Tensor:
    """Unites what lies along ``axes`` and gives it back with length 1 there."""
    for axis in axes:
        if layer.shape[axis] == 0:
            return layer
        if axis in support(layer):
            small = _stored(layer)
            known = small.max(axis, keepdim=True).values  # a label, where there is one
            slots.unite(small, known, why)
            layer = known.expand([1 if a == axis else size for a, size in enumerate(layer.shape)])
        else:
            layer = layer.narrow(axis, 0, 1)
    return layer


def _stored(layer: Tensor) -> Tensor:
    """Length 1 along expanded axes."""
    for axis in range(layer.dim()):
        if layer.shape[axis] > 1 and layer.stride(axis) == 0:
            layer = layer.narrow(axis, 0, 1)
    return layer
