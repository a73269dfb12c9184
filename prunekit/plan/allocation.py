"""How layers share the pruning: transforms that make importances of different layers comparable before one global ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from prunekit.criteria import group_scores
from prunekit.errors import UsageError, nearest
from prunekit.structure import implied_sparsity

Importances = dict[str, Tensor]
"""By layer (a parameter, or a group of units such as a convolution's channels), any shape."""


@dataclass(frozen=True)
class Request:
    """What an allocation may look at beside the importances.

    Attributes:
        sparsity: share to remove over all layers, in [0, 1).
        shapes: of each layer's weight, which Erdős–Rényi's densities follow.
        ratios: pattern -> share to remove of the layers it matches, whatever the allocation says.
        floor: share of every layer that stays, in [0, 1).
        outputs: of layers whose outputs are on another axis than the first, that axis.
    """

    sparsity: float
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0.0
    outputs: Mapping[str, int] = field(default_factory=dict)


Sharing = Callable[[Importances], Importances]
"""An allocation with its request in it."""

Allocation = Callable[[Importances, Request], Importances]
"""Importances to comparable ones of the same shapes, larger stays longer."""


def keep_global(importance: Importances, request: Request) -> Importances:
    """Importances compete across layers as they are."""
    return importance


def uniform(importance: Importances, request: Request) -> Importances:
    """Every layer loses the same share: its importances become their ranks in it, in (0, 1)."""
    return {name: _ranks(values) for name, values in importance.items()}


def rows(importance: Importances, request: Request) -> Importances:
    """Every output of every layer loses the same share: ranks among its own weights, in (0, 1) (Wanda, arXiv 2306.11695)."""
    found = {}
    for name, values in importance.items():
        axis = request.outputs.get(name, 0)
        first = values.movedim(axis, 0) if values.dim() else values[None]
        flat = first.flatten(1) if first.dim() > 1 else first[None]  # one axis is one output
        order = torch.sort(flat, dim=1, stable=True).indices
        places = (torch.arange(flat.shape[1], dtype=torch.float64) + 0.5) / max(1, flat.shape[1])
        ranks = torch.empty(flat.shape, dtype=torch.float64).scatter_(1, order, places.expand(flat.shape))
        found[name] = ranks.view(first.shape).movedim(0, axis) if values.dim() else ranks.view(())
    return found


def mean(importance: Importances, request: Request) -> Importances:
    """Each layer's importances are divided by their mean, so that layers of other scale compete fairly."""
    return {name: values / values.double().mean().clamp_min(1e-300) for name, values in importance.items()}


def lamp(importance: Importances, request: Request) -> Importances:
    """``s_i² / Σ_{j: s_j ≥ s_i} s_j²`` within each layer (LAMP: Lee et al. 2021, arXiv 2010.07611, eq. 2), of any criterion."""
    return {name: group_scores.lamp(values.double().square()) for name, values in importance.items()}


def standardised(importance: Importances, request: Request) -> Importances:
    """Each layer's importances less their mean, over their standard deviation (FLAP: An et al. 2023, arXiv 2312.11983).

    What has no importance at all goes first and takes no part in either: a pruning that goes on from an earlier one never gives
    back what is gone.
    """
    return {name: _standardised(values.double()) for name, values in importance.items()}


def _standardised(values: Tensor) -> Tensor:
    some = values[values != 0]
    if not len(some):
        return values - torch.inf
    spread = some.std(correction=0)
    centred = (values - some.mean()) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(values == 0, -torch.inf, centred)


def erk(importance: Importances, request: Request) -> Importances:
    """Erdős–Rényi kernel: density ∝ sum of a weight's axes / their product (Evci et al. 2020, arXiv 1911.11134)."""
    axes = {name: torch.Size(request.shapes.get(name, values.shape)) for name, values in importance.items()}
    density = {name: sum(shape) / shape.numel() for name, shape in axes.items()}
    return _by_density(importance, density, request.sparsity)


def proportional(importance: Importances, request: Request) -> Importances:
    """Density ∝ a layer's mean importance (with influence: a layer keeps in proportion to what it contributed)."""
    return _by_density(importance, {n: float(v.double().mean()) for n, v in importance.items()}, request.sparsity)


ALLOCATIONS: dict[str, Allocation] = {
    "global": keep_global, "uniform": uniform, "rows": rows, "mean": mean, "standardised": standardised, "lamp": lamp, "erk": erk,
    "proportional": proportional,
}  # fmt: skip
INSIDE = {"rows": rows}
"""Those that compare weights inside a layer otherwise than by their importance; for single weights alone."""
ACROSS = [name for name in ALLOCATIONS if name not in INSIDE]
"""Those that say no more than how much each layer loses; for every structure."""


def get_allocation(name: str) -> Allocation:
    """Looks an allocation up.

    Raises:
        UsageError: unknown; near names are offered.
    """
    if name not in ALLOCATIONS:
        raise UsageError(f"allocation {name!r} does not exist; {nearest(name, list(ALLOCATIONS))}")
    return ALLOCATIONS[name]


def check_allocation(name: str, structure: str) -> None:
    """Raises UsageError for an allocation that the structure does not take."""
    get_allocation(name)
    if name in INSIDE and structure != "unstructured" and implied_sparsity(structure) is None:
        raise UsageError(f"allocation {name!r} compares single weights within an output, and the structure is {structure}")


def share(importance: Importances, allocation: Allocation, request: Request) -> Importances:
    """Comparable ranks of all layers, ratios and floor included.

    Returns:
        by layer, its shape: in (0, 1) for what the ranking decides, below 0 for what a ratio removes, above 2 for what a
        ratio or the floor keeps.

    Raises:
        UsageError: a ratio, the floor or a pattern makes no sense.
    """
    _check(importance, request)
    comparable = allocation(importance, request)
    flat = torch.cat([comparable[name].flatten().double() for name in importance])
    everywhere = _ranks(flat).split([values.numel() for values in importance.values()])
    ranks = {name: part.view(importance[name].shape).clone() for name, part in zip(importance, everywhere, strict=True)}
    for name, values in ranks.items():
        order = comparable[name] if allocation in INSIDE.values() else importance[name]
        within = _ranks(order) * values.numel()  # k + 1/2 for the k-th least important
        fixed = [ratio for pattern, ratio in request.ratios.items() if fnmatchcase(name, pattern)]
        if fixed:
            values += torch.where(within < round(fixed[-1] * values.numel()), -2.0, 2.0)
        else:
            stays = -(-values.numel() * request.floor // 1)
            values += torch.where(within > values.numel() - stays, 2.0, 0.0)
    return ranks


def with_directions(comparable: Importances, outputs: Mapping[str, int]) -> Importances:
    """The same, but the most important entry of every output of these layers is never removed.

    Args:
        outputs: by layer, the axis of its outputs. Layers are those whose weights are divided by their norm.
    """
    found = dict(comparable)
    for name, axis in outputs.items():
        values = comparable[name].movedim(axis, 0).double().clone()
        rows = values.flatten(1)
        found[name] = rows.scatter(1, rows.argmax(1, keepdim=True), torch.inf).view(values.shape).movedim(0, axis)
    return found


def _check(importance: Importances, request: Request) -> None:
    if not 0 <= request.floor < 1:
        raise UsageError(f"floor is {request.floor}; it must be at least 0 and below 1 (the share of every layer that stays)")
    for pattern, ratio in request.ratios.items():
        if not 0 <= ratio < 1:
            raise UsageError(f"ratio of {pattern} is {ratio}; it must be at least 0 and below 1 (the share removed)")
        if not any(fnmatchcase(name, pattern) for name in importance):
            raise UsageError(f"ratios: {pattern!r} matches no layer; {nearest(pattern, list(importance))}")


def _by_density(importance: Importances, weight: Mapping[str, float], sparsity: float) -> Importances:
    """Comparable values with which one global ranking at ``sparsity`` keeps each layer at its density.

    What has no importance at all goes first whatever its layer's density: nothing is lost with it, and a pruning that goes on
    from an earlier one never gives back what is gone.
    """
    densities = fill(weight, {name: values.numel() for name, values in importance.items()}, 1 - sparsity)
    comparable = {}
    for name, values in importance.items():
        ranks = _ranks(values)
        full = densities[name] >= 1
        comparable[name] = torch.where(values == 0, ranks - 1, 2 + ranks if full else ranks / (1 - densities[name]))
    return comparable


def fill(weight: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Densities in proportion to ``weight``, none above 1, whose mean over weights is ``density``.

    Layers that would be more than full are full, and the others share what is left, until none is over. Without any
    weight, every layer has ``density``.
    """
    largest = max(weight[name] for name in sizes)
    if not largest > 0:
        return dict.fromkeys(sizes, density)
    weight = {name: weight[name] / largest for name in sizes}
    full: set[str] = set()
    while True:
        open_ = [name for name in sizes if name not in full]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in full)
        total = sum(weight[name] * sizes[name] for name in open_)
        scale = budget / total if total > 0 else 0.0
        over = [name for name in open_ if scale * weight[name] > 1]
        if not over:
            return {name: 1.0 if name in full else scale * weight[name] for name in sizes}
        full.update(over)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in (0, 1), ties by position."""
    order = torch.sort(values.flatten(), stable=True).indices
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = (torch.arange(len(order), dtype=torch.float64) + 0.5) / len(order)
    return ranks.view(values.shape)
