"""The parts of a model in order of what they gave to one number: layers, the channels or heads of a group, single weights.

Every coordinate's score is had in one pass along the path; a part's is the sum over its coordinates. Layers part the coordinates,
so they add up to the model's change; so do the weights of a layer, and the units of a group as far as they lie in its own layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import UsageError, nearest
from prunekit.explain.part import Part, group_of
from prunekit.explain.path import SCHEMA, by_layer, summed
from prunekit.explain.view import View, quantity
from prunekit.kernel import layers_of
from prunekit.structure import Group, Groups
from prunekit.trajectory import Layout

RANKED = 20  # parts that are named where nobody says how many
Units = Mapping[str, Groups | str]
"""Kind of unit (``channel``, ``head``) -> the model's groups, or why it has none."""


@dataclass(frozen=True)
class CoordinateScores:
    """What each coordinate gave to a view's number.

    Attributes:
        values: ``(2, P)``, float64: kernel and regularisation share.
        layers: sums by layer and stretch of training, see ``by_layer``.
        start, end: the number at both ends of the path.
    """

    layout: Layout
    values: Tensor
    layers: dict[str, Any]
    start: float
    end: float

    @property
    def completeness(self) -> dict[str, float]:
        """``start + layers + residual = model``."""
        given = float(self.values.sum())
        return {"start": self.start, "layers": given, "model": self.end, "residual": self.end - self.start - given}


def coordinate_scores(view: View) -> CoordinateScores:
    """One gradient a node of every step, of the number that sums the view up."""
    values = torch.zeros(2, view.trajectory.layout.total, dtype=torch.float64)
    layers = by_layer(view, view.own, values)
    start, end = (summed(view.own, view.values(view.trajectory.state(i)).double()) for i in (0, -1))
    return CoordinateScores(view.trajectory.layout, values, layers, start, end)


def explain_ranking(view: View, kind: str, name: str, units: Units, limit: int = RANKED) -> dict[str, Any]:
    """A layer's channels, an attention's heads, a parameter's weights or (without a name) all layers, most influential first.

    Raises:
        UsageError: there is nothing of that kind and name; near names are offered.
    """
    scores = coordinate_scores(view)
    rows, within = ranked(scores, kind, name, units)
    both = [row["both"] for row in rows]
    of = f" of {name}" if name else ""
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "ranking",
        "ranks": kind,
        "name": name,
        "index": "",
        "title": f"{kind}s{of}, ranked",
        "quantity": quantity(view),
        **view.about,
        "samples": view.looked,
        "parts": len(rows),
        "rows": rows[:limit],
        "sum": sum(both),
        "within": within,
        "layers": scores.layers,
        "completeness": scores.completeness,
        "certificate": {"nodes": view.nodes, "rule": view.rule},
    }


def ranked(scores: CoordinateScores, kind: str, name: str, units: Units) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows by size, and of units what their layer holds beside them: ``whole``, and ``left``, what lies in none of them.

    A row has ``name`` (as ``explain`` takes it), ``kernel``, ``regularisation`` and ``both``; of a unit also ``inside``, the part
    of ``both`` that lies in the layer that it is named after.
    """
    if kind == "layer":
        return _by_size(_layers(scores)), None
    if kind == "weight":
        return _by_size(_weights(scores, name)), None
    found = units[kind]
    if isinstance(found, str):
        raise UsageError(f"{kind}s of {name!r}: {found}")
    return _units(scores, group_of(kind, name, found))


def inside(scores: CoordinateScores, part: Part, units: Units, limit: int = RANKED) -> dict[str, Any]:
    """What a part consists of, ranked: of a layer its units and weights, of a unit its weights."""
    found: dict[str, Any] = {}
    for unit, groups in units.items() if part.kind == "layer" else ():
        if not isinstance(groups, str) and any(group.name == part.name for group in groups):
            rows, within = ranked(scores, unit, part.name, units)
            found[unit] = {"rows": rows[:limit], "parts": len(rows), "within": within}
    if part.kind != "weight":
        where = part.mask.nonzero().flatten()
        found["weight"] = {"rows": _strongest(scores, where, limit), "parts": len(where)}
    return found


def layers_ranked(scores: CoordinateScores, limit: int) -> dict[str, Any]:
    """The strongest layers."""
    rows = _by_size(_layers(scores))
    return {"rows": rows[:limit], "parts": len(rows)}


def every_unit(scores: CoordinateScores, units: Units, limit: int) -> dict[str, Any]:
    """The strongest units of the whole model by kind, or ``note``, why there are none."""
    found: dict[str, Any] = {}
    for kind, groups in units.items():
        if isinstance(groups, str):
            found[kind] = {"note": groups, "rows": [], "parts": 0}
            continue
        rows = _by_size([row for group in groups for row in _units(scores, group)[0]])
        found[kind] = {"rows": rows[:limit], "parts": len(rows)}
    return found


def _layers(scores: CoordinateScores) -> list[dict[str, Any]]:
    return [
        _row(name, *(float(sum(values[span].sum() for span in spans)) for values in scores.values))
        for name, spans in layers_of(scores.layout).items()
    ]


def _weights(scores: CoordinateScores, name: str) -> list[dict[str, Any]]:
    mask = torch.zeros(scores.layout.total, dtype=torch.bool)
    for entry in scores.layout:
        if entry.name == name or entry.name.startswith(f"{name}."):
            mask[entry.span] = True
    if not mask.any():
        known = [entry.name for entry in scores.layout]
        raise UsageError(f"weight {name!r} does not exist; {nearest(name, known)}")
    where = mask.nonzero().flatten()
    return _strongest(scores, where, len(where))


def _strongest(scores: CoordinateScores, where: Tensor, limit: int) -> list[dict[str, Any]]:
    """The strongest of the coordinates at ``where``."""
    values = scores.values[:, where]
    order = values.sum(0).abs().argsort(descending=True, stable=True)[:limit]
    names = _names(scores.layout, where[order].tolist())
    return [_row(name, float(values[0, k]), float(values[1, k])) for name, k in zip(names, order.tolist(), strict=True)]


def _names(layout: Layout, where: Sequence[int]) -> list[str]:
    """``conv.weight 7,3,1,1`` of coordinates."""
    found = []
    starts = torch.tensor([entry.offset for entry in layout])
    for place in where:
        entry = layout.entries[int(torch.searchsorted(starts, place, right=True)) - 1]
        index = torch.unravel_index(torch.tensor(place - entry.offset), entry.shape) if entry.shape else ()
        found.append(f"{entry.name} {','.join(str(int(i)) for i in index)}".rstrip())
    return found


def _units(scores: CoordinateScores, group: Group) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a group's units, and what its layer holds."""
    own = [entry for entry in scores.layout if entry.name.startswith(f"{group.name}.")]
    sums = [_unit_sums(scores.layout, values, group) for values in scores.values]
    whole = float(sum(scores.values[:, entry.span].sum() for entry in own))
    mine = sum((one[1] for one in sums), torch.zeros(group.size, dtype=torch.float64))
    rows = [
        {**_row(f"{group.name} {unit}", float(sums[0][0][unit]), float(sums[1][0][unit])), "inside": float(mine[unit])}
        for unit in range(group.size)
    ]
    return _by_size(rows), {"layer": group.name, "whole": whole, "left": whole - float(mine.sum())}


def _unit_sums(layout: Layout, values: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Sums ``(units,)`` of ``values`` ``(P,)`` over all that leaves with each unit, and over its part in its layer."""
    axes: dict[str, list[tuple[int, Tensor]]] = {}
    for member, where in group.members.items():
        name, axis = member.rsplit("@", 1)
        axes.setdefault(name, []).append((int(axis), where))
    every = torch.zeros(group.size, dtype=torch.float64)
    own, views = torch.zeros_like(every), layout.views(values)
    for name, members in axes.items():
        if name not in views:
            continue
        found = _along(views[name], members)
        every += found
        if name.startswith(f"{group.name}."):
            own += found
    return every, own


def _along(values: Tensor, members: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Sums ``(units,)`` over the slices of one tensor; what lies in slices of several axes counts once."""
    if len(members) == 1:
        axis, where = members[0]
        sums = values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1)
        return torch.stack([sums[one.unique()].sum() for one in where])
    found = []
    for unit in range(len(members[0][1])):
        mask = torch.zeros_like(values, dtype=torch.bool)
        for axis, where in members:
            mask.index_fill_(axis, where[unit], True)
        found.append(values[mask].sum())
    return torch.stack(found)


def _row(name: str, kernel: float, regularisation: float) -> dict[str, Any]:
    return {"name": name, "kernel": kernel, "regularisation": regularisation, "both": kernel + regularisation}


def _by_size(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -abs(float(row["both"])))
