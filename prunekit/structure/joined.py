"""Structures joined by ``+`` (``heads+neurons``, ``neurons+layers``): units of several kinds under one budget, in one ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch

from prunekit.errors import StructureError, UsageError, nearest
from prunekit.registry import Registry
from prunekit.structure.cut import Prober
from prunekit.structure.groups import Group, Groups
from prunekit.structure.structure import Mappings, Structure

SHOWN = 5


def parts_of(structure: str) -> list[str]:
    """Names that are joined in one; a name by itself is one.

    Example:
        >>> parts_of("heads+neurons"), parts_of("2:4")
        (['heads', 'neurons'], ['2:4'])
    """
    return structure.split("+")


class Structures(Registry[Structure]):
    """The table of structures, and all that can be joined of them: ``table["heads+neurons"]`` finds the units of both."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and "+" in name and self.fault(name) is None)

    def __missing__(self, name: str) -> Structure:
        if "+" not in name or super().__contains__(name):
            return super().__missing__(name)
        if (fault := self.fault(name)) is not None:
            raise UsageError(fault)
        return joined({part: self[part] for part in parts_of(name)})

    def is_own(self, name: str) -> bool:
        return all(map(super().is_own, parts_of(name)))

    def fault(self, name: str) -> str | None:
        """Why no structures are joined by this name; None where they are. Code of users is not imported for it."""
        parts = parts_of(name)
        for part in parts:
            if not super().__contains__(part):
                return f"structure {name!r}: {part!r} cannot be joined; {nearest(part, self.names())}"
        if (twice := next((part for part in parts if parts.count(part) > 1), None)) is not None:
            return f"structure {name!r} names {twice} twice; leave one out"
        for part in filter(super().is_own, parts):
            if (inside := next((other for other in parts if other in self[part].holds), None)) is not None:
                return f"structure {name!r}: {part} hold {inside} already; leave {inside} out"
        return None


def joined(parts: Mapping[str, Structure]) -> Structure:
    """One structure of several, whose units compete with each other."""
    return Structure(
        partial(_find, parts),
        "; ".join(kind.describes for kind in parts.values()),
        sized=any(kind.sized for kind in parts.values()),
    )


def nothing_of(kind: Structure, refused: Mapping[str, str]) -> str:
    """What to say of a model in which nothing of a structure can be cut."""
    if not refused:
        return kind.nothing
    shown = [f"{name or 'the model'}: {reason}" for name, reason in refused.items()]
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"nothing can be removed: {'; '.join(shown[:SHOWN])}{more}"


def _find(parts: Mapping[str, Structure], prober: Prober, attention: Mappings) -> Groups:
    """The groups of every part, checked each for itself, and once more all together.

    A group whose name is taken has its structure's behind it: ``blocks.0/layers``.

    Raises:
        StructureError: a part has none, two parts hold the same, or units of several cannot go together.
    """
    together = "+".join(parts)
    found: dict[str, Group] = {}
    refused: dict[str, str] = {}
    of: dict[str, str] = {}
    last = sorted(parts, key=lambda name: name == "layers")  # a block's attention may have the block's name, and keeps it
    for name in last:
        groups = parts[name].find(prober, attention)
        if not groups:
            raise StructureError(f"{together}: {nothing_of(parts[name], groups.refused)}; leave {name} out")
        for group in groups:
            called = f"{group.name}/{name}" if group.name in found else group.name
            found[called], of[called] = replace(group, name=called), name
        refused |= {group: reason for group, reason in groups.refused.items() if group not in refused}
    every = list(found.values())
    if (both := _overlap(every)) is not None:
        one, two = (of[group.name] for group in both)
        raise StructureError(f"{together}: {one} and {two} both hold {both[0].name}; leave one of them out")
    if (reason := prober.fault(_some_of_each(every))) is not None:
        raise StructureError(f"{together}: each can be cut, but not together: {reason}")
    return Groups(every, {name: reason for name, reason in refused.items() if name not in of}, of)


def _some_of_each(groups: Sequence[Group]) -> list[Group]:
    """Groups to cut at once: every second whole block, so that something of the other units is still there to be cut."""
    whole = [group for group in groups if group.whole]
    return [group for group in groups if not group.whole] + whole[1::2]


def _overlap(groups: Sequence[Group]) -> tuple[Group, Group] | None:
    """Two groups that hold the same slices; whole blocks may hold what others have in them, but not each other's."""
    holders: dict[str, list[Group]] = {}
    for group in groups:
        for member in group.members:
            holders.setdefault(member, []).append(group)
    for member, some in holders.items():
        for one, two in combinations(some, 2):
            if one.whole == two.whole and torch.isin(one.members[member], two.members[member]).any():
                return one, two
    return None
