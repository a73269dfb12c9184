"""What a person can point at in a model (a weight, a channel, a head, a layer), and what it contributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Inputs
from prunekit.errors import UsageError, nearest
from prunekit.explain.path import JUMP_NODES, SCHEMA, PrunedPath, summed, trace
from prunekit.explain.tokens import token_account
from prunekit.explain.training import Training, training_samples
from prunekit.explain.view import View, quantity
from prunekit.structure import GROUPED, Group, Groups, find_groups
from prunekit.structure.structure import Mappings
from prunekit.trajectory import Layout

PASSAGES = 8  # texts of samples whose tokens an explanation of a part has
UNITS_OF = {structure.part: name for name, structure in GROUPED.items() if structure.part is not None}
"""Kinds of parts that are units of a group -> the structure whose groups they are."""


@dataclass(frozen=True)
class Part:
    """``kind`` and ``name`` as they were asked for, ``index`` inside (empty for a layer), ``mask`` flat ``(P,)`` of bool."""

    kind: str
    name: str
    index: str
    mask: Tensor

    @property
    def title(self) -> str:
        if self.kind == "weight":
            return f"weight {self.name}[{self.index}]"
        return f"{self.kind} {self.index} of {self.name}" if self.index else f"{self.kind} {self.name}"

    def counts(self, layout: Layout) -> dict[str, int]:
        """How many coordinates of each parameter or buffer belong to it."""
        found = {entry.name: int(self.mask[entry.span].sum()) for entry in layout}
        return {name: count for name, count in found.items() if count}


def find_part(
    kind: str, name: str, index: str, layout: Layout, model: nn.Module, example: Callable[[], Inputs], attention: Mappings = ()
) -> Part:
    """The part that ``kind name index`` points at.

    Args:
        index: of a weight, one number an axis (``7,3,1,1``); of a channel or head, its number; of a layer, empty.
        example: gives one or two samples, for tracing; called for channels and heads only.
        attention: see ``prunekit.structure.find_groups``.

    Raises:
        UsageError: there is no such part; near names are offered.
        StructureError: the model has no channels or heads that could leave alone.
    """
    if kind == "layer":
        return Part(kind, name, _nothing(index, "a layer has no number"), _layer(layout, name))
    if kind == "weight":
        return Part(kind, name, *_weight(layout, name, index))
    return _unit(kind, name, index, layout, find_groups(UNITS_OF[kind], model, example(), attention))


def explain_part(view: View, part: Part, training: Training | None = None, pruned: Sequence[PrunedPath] = ()) -> dict[str, Any]:
    """What a part contributed: to which classes, when, from which training samples, and what pruning did through it.

    What it consists of is ranked by ``prunekit.explain.ranking``.

    Example:
        >>> import copy
        >>> import torch
        >>> from prunekit import Trajectory
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> from prunekit.explain import View, explain_part, find_part
        >>> x = torch.randn(16, 4)
        >>> y = x[:, 0].gt(0).long()
        >>> path = Trajectory.of(copy.deepcopy(model), model)
        >>> view = View.of(model, path, x, y)
        >>> part = find_part("layer", "0", "", path.layout, model, lambda: x[:2])
        >>> explain_part(view, part)["title"]
        'layer 0'
    """
    mask, weights = part.mask.to(view.function.device), view.own
    traced = trace(view, mask)
    kernel, regularisation = traced.kernel, traced.regularisation
    both = kernel + regularisation
    end = view.values(view.trajectory.state(-1)).double()
    by_kernel, by_decay = {c: own for c, own, _ in view.classes(kernel)}, {c: own for c, own, _ in view.classes(regularisation)}
    strength = {c: float(both[view.labels == c].abs().mean() if view.classifies else both[:, c].abs().mean()) for c in by_kernel}
    model = {c: own for c, own, _ in view.classes(end)}
    rows = [
        {
            "class": c, "samples": int((view.labels == c).sum()) if view.classifies else view.count,
            "own": own, "others": others, "tells_apart": own - others if view.classifies else own,
            "kernel": by_kernel[c], "regularisation": by_decay[c], "mean_size": strength[c], "model": model[c],
        }
        for c, own, others in view.classes(both)
    ]  # fmt: skip
    account = token_account(view, both, most=PASSAGES)
    start, last = view.trajectory.state(0).cpu()[part.mask], view.trajectory.state(-1).cpu()[part.mask]
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": part.kind,
        "name": part.name,
        "index": part.index,
        "title": part.title,
        "quantity": quantity(view),
        **view.about,
        "samples": view.looked,
        "weights": {
            "total": int(part.mask.sum()), "by_tensor": part.counts(view.trajectory.layout),
            "norm_at_start": float(start.norm()), "norm_at_end": float(last.norm()),
            **({"value_at_start": float(start), "value_at_end": float(last)} if len(last) == 1 else {}),
        },
        "contribution": {
            "kernel": summed(weights, kernel), "regularisation": summed(weights, regularisation), "both": summed(weights, both),
            "mean_size": float(both.abs().mean()),
            "model_at_start": summed(weights, traced.start), "model": summed(weights, end),
        },
        "classes": sorted(rows, key=lambda row: -abs(float(row["tells_apart"]))),
        **({} if account is None else {"tokens": account}),
        "steps": traced.steps,
        "training": training_samples(view, weights[None], mask, training, summed(weights, kernel)),
        "pruning": [_pruned_part(view, path, part) for path in pruned],
        "certificate": traced.certificate,
    }  # fmt: skip


def _pruned_part(view: View, path: PrunedPath, part: Part) -> dict[str, Any]:
    """What the pruning did to the outputs through a part."""
    weights, mask = view.own, part.mask.to(view.function.device)
    through, change, whole = (torch.zeros_like(weights, dtype=torch.float64) for _ in range(3))
    for jump in path.jumps:
        through += view.moved(jump, "whole", mask, JUMP_NODES)
        whole += view.moved(jump, "whole", None, JUMP_NODES)
        change += view.values(jump.end).double() - view.values(jump.start).double()
    inside = path.keep[part.mask]
    unit = part.kind in UNITS_OF and part.name in path.units
    return {
        "name": path.name,
        "stays": bool(path.units[part.name][int(part.index)]) if unit else bool(inside.any()),
        "removed": int((~inside).sum()),
        "of": len(inside),
        "change": summed(weights, through),
        "whole_change": summed(weights, change),
        "mean_size": float(through.abs().mean()),
        "whole_mean_size": float(change.abs().mean()),
        "residual": float((whole - change).abs().mean()),
        "classes": [{"class": c, "own": own, "others": others} for c, own, others in view.classes(through)],
    }


def unit_mask(layout: Layout, members: dict[str, Tensor], unit: int) -> Tensor:
    """Every coordinate that leaves with a unit of a group, flat ``(P,)`` of bool.

    Args:
        members: ``<param>@<axis>`` -> ``(units, block)``, as in ``prunekit.structure.Group``.
    """
    mask = torch.zeros(layout.total, dtype=torch.bool)
    views = layout.views(mask)
    for member, where in members.items():
        name, axis = member.rsplit("@", 1)
        if name in views:
            views[name].index_fill_(int(axis), where[unit], True)
    return mask


def _layer(layout: Layout, name: str) -> Tensor:
    mask = torch.zeros(layout.total, dtype=torch.bool)
    for entry in layout:
        if entry.name == name or entry.name.startswith(f"{name}."):
            mask[entry.span] = True
    if not mask.any():
        raise UsageError(f"layer {name!r} holds nothing that was trained, or does not exist; {nearest(name, _modules(layout))}")
    return mask


def _modules(layout: Layout) -> list[str]:
    found: dict[str, None] = {}
    for entry in layout:
        parts = entry.name.split(".")
        found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, max(len(parts), 2)))
    return list(found)


def _weight(layout: Layout, name: str, index: str) -> tuple[str, Tensor]:
    entries = {entry.name: entry for entry in layout}
    if name not in entries:
        raise UsageError(f"weight {name!r} does not exist; {nearest(name, list(entries))}")
    shape = entries[name].shape
    try:
        where = [int(number) for number in index.split(",")] if index else []
    except ValueError:
        where = []
    if len(where) != len(shape) or not all(0 <= i < size for i, size in zip(where, shape, strict=True)):
        largest = ",".join(str(size - 1) for size in shape)
        raise UsageError(f"weight {name} at {index or 'no index'} does not exist; give one number an axis, at most {largest}")
    mask = torch.zeros(layout.total, dtype=torch.bool)
    layout.views(mask)[name][tuple(where)] = True
    return ",".join(map(str, where)), mask


def group_of(kind: str, name: str, groups: Groups) -> Group:
    """The group of units called ``name``.

    Raises:
        UsageError: there is none; near names are offered.
    """
    known = {group.name: group for group in groups}
    if name not in known:
        if name in groups.refused:
            raise UsageError(f"{kind}s of {name!r} do not stand alone: {groups.refused[name]}")
        raise UsageError(f"{name!r} has no {kind}s that stand alone; {nearest(name, list(known))}")
    return known[name]


def _unit(kind: str, name: str, index: str, layout: Layout, groups: Groups) -> Part:
    group = group_of(kind, name, groups)
    if not index.isdecimal() or int(index) >= group.size:
        raise UsageError(
            f"{kind} {index or '(no number)'} of {name} does not exist; it has {group.size}, numbered 0 to {group.size - 1}"
        )
    return Part(kind, name, str(int(index)), unit_mask(layout, group.members, int(index)))


def _nothing(index: str, why: str) -> str:
    if index:
        raise UsageError(f"{why}; leave {index!r} out")
    return index
