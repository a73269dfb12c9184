"""Whole units (channels, heads, blocks): removed in order of importance until the asked share is nearest."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.criteria.group_scores import growth
from prunekit.criteria.scores import Scores
from prunekit.errors import UsageError
from prunekit.plan.allocation import Sharing
from prunekit.plan.left import Left, Parts, nearest_to, split
from prunekit.structure import Group, takes_sizes
from prunekit.structure.roles import weight_roles

STACK = "layers"
"""Name under which whole blocks compete: each is alone in its group, so they are one layer to an allocation."""


@dataclass(frozen=True)
class Sizes:
    """Which numbers of units a group may keep.

    Attributes:
        round_to: what stays of a group's outputs is a multiple of this, or all of it; of heads, their number is.
        least: as many units stay at least, or all where there are fewer.
        uniform: all groups of a kind (see ``kind_of``) keep as many, and those outside stacks of blocks keep all.
    """

    round_to: int = 1
    least: int = 1
    uniform: bool = False

    def check(self, structure: str) -> None:
        """Raises UsageError unless both make sense for the structure."""
        for name, value in (("round_to", self.round_to), ("min_units", self.least)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; it must be a whole number of 1 or more")
            if value > 1 and not takes_sizes(structure):
                raise UsageError(f"{name} is {value}; it is for channels and heads, and the structure is {structure}")
        if self.uniform and not takes_sizes(structure):
            raise UsageError(f"uniform is for channels, heads, neurons and experts, and the structure is {structure}")

    def bundles(self, group: Group, counted: bool, comparable: Tensor) -> list[tuple[float, list[int]]]:
        """Units that leave at once, least important first, with their mean importance.

        Args:
            counted: they are heads or the like, so that units are counted, not the outputs that they hold.
        """
        order = sorted(range(group.size), key=lambda unit: (float(comparable[unit]), unit))
        if group.whole:
            return [(float(comparable[unit]), [unit]) for unit in order]
        each = 1 if counted else next(iter(group.members.values())).shape[1]
        step = lcm(self.round_to // gcd(each, self.round_to), group.multiple)
        least = -(-max(self.least, group.least) // step) * step
        found: list[tuple[float, list[int]]] = []
        stays = group.size
        while (count := stays - (stays - 1) // step * step) and stays - count >= least:
            bundle = order[group.size - stays :][:count]
            mean = sum(float(comparable[unit]) for unit in bundle) / count
            found.append((max(mean, found[-1][0]) if found else mean, bundle))  # rounding must not change their order
            stays -= count
        return found


FREE = Sizes()
"""Any number of units, but one at least."""


def channel_keeps(
    scores: Scores,
    groups: Sequence[Group],
    shapes: dict[str, tuple[int, ...]],
    prunable: Sequence[str],
    sparsity: float,
    allocation: Sharing,
    sizes: Sizes = FREE,
    counted: Collection[str] = (),
    by_weight: bool = False,
) -> dict[str, Tensor]:
    """Units to keep by group name, ``(units,)``.

    Units go one by one, or as many at once as ``sizes`` asks for, least important first, the last one of a group never (whole
    blocks have no such last one); of the states passed through, the one whose removed share of prunable parameters is nearest
    to ``sparsity`` is taken, see ``nearest_to``.

    Args:
        counted: groups of heads or the like, see ``Sizes.bundles``.
        by_weight: units are of several kinds and compete by their importance per prunable weight that leaves with them (the
            square of it where squares add up over weights, see ``prunekit.criteria.group_scores.growth``).
    """
    left = Left(groups, shapes, prunable)
    importance = scores.groups({group.name: group.members for group in groups})
    if by_weight and (power := growth(scores)):
        costs = {group.name: max(1, left.cost(g)) ** power for g, group in enumerate(groups)}
        importance = {name: values.double() / costs[name] for name, values in importance.items()}
    comparable = _comparable(importance, groups, allocation)
    keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    ranking = sorted(_steps(groups, comparable, sizes, counted), key=lambda step: step[:3])
    blocks = {g for g, group in enumerate(groups) if group.whole}
    blocks = blocks if len(blocks) < len(groups) else set()
    for parts in nearest_to(sparsity * left.total, [step[3] for step in ranking], left, blocks):
        for g, units in parts:
            keep[groups[g].name][units] = False
    return keep


Step = tuple[float, int, int, Parts]
"""What leaves at once: its importance, the (first) group and the place in it, and the units of each group, by their numbers."""


def _steps(groups: Sequence[Group], comparable: Mapping[str, Tensor], sizes: Sizes, counted: Collection[str]) -> list[Step]:
    """Everything that may leave at once, in any order.

    Raises:
        UsageError: ``uniform``, and no group stands in a stack of blocks.
    """
    bundles = [sizes.bundles(group, group.name in counted, comparable[group.name]) for group in groups]
    found: list[Step] = [
        (value, g, place, [(g, units)])
        for g, each in enumerate(bundles)
        if groups[g].whole or not sizes.uniform
        for place, (value, units) in enumerate(each)
    ]
    if not sizes.uniform:
        return found
    kinds: dict[Any, list[int]] = {}
    for g, group in enumerate(groups):
        if not group.whole and IN_A_STACK.search(group.name):
            kinds.setdefault(kind_of(group), []).append(g)
    if not kinds:
        raise UsageError(f"uniform is about blocks in a stack, and none has what can go here ({groups[0].name} stands in none)")
    for alike in kinds.values():
        for place in range(min(len(bundles[g]) for g in alike)):
            value = sum(bundles[g][place][0] for g in alike) / len(alike)
            found.append((value, alike[0], place, [(g, bundles[g][place][1]) for g in alike]))
    return found


IN_A_STACK = re.compile(r"(?:^|\.)\d+\.|[^.\d][^.]*\.\d+$")
"""In the name of what stands in a block of a stack: the block's number."""


def kind_of(group: Group) -> Any:
    """What groups have in common that a model's config says in one number: how many units, of which layer, how large."""
    member, where = next(iter(group.members.items()))
    layer = re.sub(r"\d+", "", ".".join(split(member)[0].split(".")[-2:]))
    return group.size, layer, where.shape[1]


Protected = Callable[[Group], str | None]
"""Name of a parameter of the group that may lose nothing; None when there is none."""


def protected(model: nn.Module, prunable: Sequence[str], kept: Sequence[str]) -> Protected:
    """What is ignored, seen from a group: layers in ``kept`` lose nothing, weights that may not be pruned lose no outputs.

    Args:
        prunable: names of weights that may be pruned. A frozen weight may be cut with what surrounds it.
        kept: layers that a pattern of ``prunable.ignore`` covers whole.
    """
    may = set(prunable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = {name: role for name, role in weight_roles(model).items() if name in trained and name not in may}

    def find(group: Group) -> str | None:
        for member in group.members:
            name, axis = split(member)
            if name.rpartition(".")[0] in kept or (name in held and (group.whole or axis == held[name].output)):
                return name
        return None

    return find


def prunable_groups(groups: Sequence[Group], prunable: Sequence[str], ignored: Protected) -> tuple[list[Group], dict[str, str]]:
    """Groups that hold at least one weight that may be pruned and nothing that is ignored, and the others with the reason."""
    may = set(prunable)
    kept, refused = [], {}
    for group in groups:
        if not any(split(member)[0] in may for member in group.members):
            refused[group.name] = "none of its weights may be pruned"
        elif (name := ignored(group)) is not None:
            refused[group.name] = f"{name} is ignored (prunable.ignore) and would lose something with it"
        else:
            kept.append(group)
    return kept, refused


def _comparable(importance: Mapping[str, Tensor], groups: Sequence[Group], allocation: Sharing) -> dict[str, Tensor]:
    whole = [group.name for group in groups if group.whole]
    entries = {name: values for name, values in importance.items() if name not in whole}
    if not whole:
        return allocation(entries)
    stacked = allocation({**entries, STACK: torch.cat([importance[name] for name in whole])})
    return {**stacked, **dict(zip(whole, stacked[STACK].split(1), strict=True))}
