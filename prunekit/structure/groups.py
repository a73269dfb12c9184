"""Units that leave whole (channels, heads, blocks), and which slices of which tensors leave with each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SKIP = "skip"
"""Kind of replacement that stands for a whole block that was removed."""
SKIPS = re.compile(rf"{SKIP}(?:-([1-5])((?:@\d{{1,2}}|@-){{0,4}}))?")
"""All of them. ``skip-3`` stands for a block that gives its first input in a tuple of three, the others None; ``skip-3@2@-`` for
one that gives what its forward calls its argument number 2 behind it, and then None."""
ROUTER = "router"
"""Kind of stand-in for a router that never chooses the experts which are gone."""


def is_skip(kind: Any) -> bool:
    """Whether a kind of replacement stands for a whole block that was removed."""
    return isinstance(kind, str) and SKIPS.fullmatch(kind) is not None


@dataclass(frozen=True)
class Group:
    """Units that are alike, and everything that goes with each.

    Attributes:
        name: of the layer whose outputs they are, such as ``conv2``; of the attention module; of the block.
        members: ``<parameter or buffer>@<axis>`` -> ``(units, block)``, the indices on that axis of each unit;
            the block is more than 1 behind a flattening, for heads, and where several channels can only go together.
        attributes: ``<module>:<attribute>`` -> by how much a unit that leaves lowers it, such as ``heads`` by 1.
        replace: module -> kind of the module that takes its place once a unit is gone, a name from
            ``prunekit.structure.replacements``.
        masked: module -> kind of what stands in for it in the masked model once a unit is gone, where zeros alone do not compute
            what the smaller model does, see ``prunekit.structure.stand_ins``: a router, a block that normalises its output.
        least: as many units stay at least.
        multiple: as many units stay as a multiple of this, or all.
    """

    name: str
    members: dict[str, Tensor]
    attributes: dict[str, int] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)
    masked: dict[str, str] = field(default_factory=dict)
    least: int = 1
    multiple: int = 1

    @property
    def size(self) -> int:
        return len(next(iter(self.members.values())))

    @property
    def whole(self) -> bool:
        """Whether it may lose its last unit, since something stands in for all of it."""
        return any(map(is_skip, self.replace.values()))

    def index(self) -> dict[str, Tensor]:
        """``<group>|<param>@<axis>`` -> ``(units, block)``."""
        return {f"{self.name}|{member}": where for member, where in self.members.items()}


class Groups(list[Group]):
    """Groups of a model.

    Attributes:
        refused: what cannot be cut, by name, with the reason.
        of: by group, the structure that found it, where several are joined; else empty.
    """

    def __init__(self, groups: Iterable[Group], refused: Mapping[str, str], of: Mapping[str, str] | None = None) -> None:
        super().__init__(groups)
        self.refused, self.of = dict(refused), dict(of or {})


def kept_indices(
    index: Mapping[str, Tensor], keep: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """``<param>@<axis>`` -> kept indices on that axis, ascending; only axes that lose something.

    Args:
        index: see ``Group.index``; of several groups, whose removals add up.
        keep: by group, ``(units,)``.
    """
    gone: dict[str, list[Tensor]] = {}
    for key, where in index.items():
        group, member = key.split("|")
        removed = where[~keep[group]].flatten()
        if len(removed):
            gone.setdefault(member, []).append(removed)
    kept = {}
    for member, parts in gone.items():
        name, axis = member.rsplit("@", 1)
        stays = torch.ones(shapes[name][int(axis)], dtype=torch.bool)
        stays[torch.cat(parts)] = False
        kept[member] = stays.nonzero().flatten()
    return kept


def slice_masks(kept: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Boolean masks by name, True where a weight lies in kept indices on every axis."""
    masks: dict[str, Tensor] = {}
    for member, indices in kept.items():
        name, axis = member.rsplit("@", 1)
        shape = shapes[name]
        along = torch.zeros(shape[int(axis)], dtype=torch.bool)
        along[indices] = True
        along = along.view([-1 if a == int(axis) else 1 for a in range(len(shape))]).expand(shape)
        masks[name] = masks[name] & along if name in masks else along.clone()
    return masks


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter and buffer by name; tied ones under each of their names."""
    found = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return found | {name: tuple(b.shape) for name, b in model.named_buffers(remove_duplicate=False)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that share their tensor with an earlier one -> that one's name, and back."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
            tied.setdefault(first[id(parameter)], name)
        else:
            first[id(parameter)] = name
    return tied
