"""How many weights are left as units go one by one, and how far down their ranking to go for a share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from prunekit.structure import Group

Parts = list[tuple[int, list[int]]]
"""What leaves at once: the units of each group, by their numbers."""


class Left:
    """How many prunable weights are left as units go, ``total`` at first: a tensor keeps the product of its axes.

    A whole block is one more axis, of length 1, of every tensor that it holds: whatever else of them went, nothing is left.
    """

    def __init__(self, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]], prunable: Sequence[str]) -> None:
        self._lengths = {name: [*shapes[name], 1] for name in prunable}
        self._cuts: list[list[tuple[str, int, int]]] = []
        for group in groups:
            held = [(*split(member), where.shape[1]) for member, where in group.members.items()]
            cuts = [(name, axis, block) for name, axis, block in held if name in self._lengths]
            if group.whole:
                cuts = [(name, -1, 1) for name in dict.fromkeys(name for name, _, _ in cuts)]
            self._cuts.append(cuts)
        self.total = sum(map(prod, self._lengths.values()))

    def remove(self, group: int, units: int) -> int:
        """Takes units out of a group, by its number; returns how many weights leave with them."""
        touched = {name for name, _, _ in self._cuts[group]}
        before = sum(prod(self._lengths[name]) for name in touched)
        for name, axis, block in self._cuts[group]:
            self._lengths[name][axis] -= block * units
        return before - sum(prod(self._lengths[name]) for name in touched)

    def cost(self, group: int) -> int:
        """Weights that would leave with one unit of a group."""
        found = self.remove(group, 1)
        self.remove(group, -1)
        return found

    def take(self, parts: Parts) -> int:
        """Takes out all that leaves at once; returns how many weights leave."""
        return sum(self.remove(group, len(units)) for group, units in parts)

    def give_back(self, parts: Parts) -> int:
        """Undoes ``take``; returns how many weights come back."""
        return -sum(self.remove(group, -len(units)) for group, units in reversed(parts))


def nearest_to(target: float, ranking: Sequence[Parts], left: Left, blocks: Collection[int] = ()) -> list[Parts]:
    """What goes of a ranking, from its beginning, so that the number of weights that leave is nearest to ``target``.

    What goes inside a block that is gone as a whole counts with the block, once. A block is large: one that leads beyond
    ``target`` goes all the same if as many smaller units, those that were due last, can stay for it; else it is passed over.

    Args:
        left: nothing is gone of it yet; afterwards what goes is, and what was looked at beyond that.
        blocks: numbers of the groups that are whole blocks, where not all are.
    """
    taken: list[Parts] = []
    best, gone = 0, 0
    nearest = target
    for parts in ranking:
        more = left.take(parts)
        if parts[0][0] in blocks and gone + more > target:
            stay, instead = _instead(taken, left, gone + more - target, blocks)
            if abs(gone + more - instead - target) >= nearest:
                for other in stay:
                    left.take(other)
                left.give_back(parts)
                continue
            return [*(one for one in taken if not any(one is other for other in stay)), parts]
        gone += more
        taken.append(parts)
        if abs(gone - target) < nearest:
            best, nearest = len(taken), abs(gone - target)
        if gone >= target:
            break
    return taken[:best]


def _instead(taken: Sequence[Parts], left: Left, over: float, blocks: Collection[int]) -> tuple[list[Parts], int]:
    """Smaller units that stay after all, those that were due last, so that ``over`` comes nearest to 0; and their weights."""
    stay: list[Parts] = []
    total = 0
    for parts in reversed(taken):
        if parts[0][0] in blocks:
            continue
        back = left.give_back(parts)
        if not back or abs(over - total - back) >= abs(over - total):  # it is inside a block that is gone; or too large
            left.take(parts)
            if back:
                break
            continue
        stay.append(parts)
        total += back
    return stay, total


def split(member: str) -> tuple[str, int]:
    """``<param>@<axis>`` in two."""
    name, axis = member.rsplit("@", 1)
    return name, int(axis)
