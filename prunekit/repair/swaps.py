"""What may be swapped for what: weights, tiles of them, weights inside runs of M, channels, heads, blocks. One class each.

Everything a repair needs of a pruning pattern is how its *units* (weights, tiles, channels, …) lie in the model's flat
coordinates ``(P,)``, and which sets of units are allowed. Units are one flat vector ``(U,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, attribute, second_moments
from prunekit.kernel.blame import Batches
from prunekit.kernel.gradients import MomentEngine
from prunekit.plan import Plan
from prunekit.plan.plan import MIN_UNITS, REPLACE, ROUND_TO, UNIFORM
from prunekit.repair.limits import Allowance, Limits, Sizes, ranks
from prunekit.structure import GROUPED, pattern_of
from prunekit.structure.groups import is_skip
from prunekit.trajectory import Layout, Segment


class Swaps(Protocol):
    """``keep``: the plan's own choice, boolean ``(U,)``."""

    keep: Tensor

    def expand(self, units: Tensor) -> Tensor:
        """Factors of the model's coordinates, ``(U,) -> (P,)``; differentiable."""

    def gather(self, blame: Tensor, keep: Tensor) -> Tensor:
        """Blame of removed units from that of coordinates, ``(P,) -> (U,)``; sums are kept."""

    def magnitude(self, theta: Tensor) -> Tensor:
        """Size of every unit in the dense model ``(P,)``, comparable across layers as the pattern compares them, ``(U,)``."""

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        """``(Σ_n (Σ_{i in unit} θ_i ∂_i f(x_n; θ))²)^½`` of every unit at ``theta``, ``(U,)``."""

    count: int
    """Units kept in all."""

    def select(self, worth: Tensor) -> Tensor:
        """The most valuable allowed set of as many units, or weights in units, as the plan keeps, ``(U,)`` boolean."""

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """``keep`` and the removed units that gain most: ``share`` of the number kept, one at least, as far as allowed.

        A unit whose gain is minus infinity stays away.
        """

    def exchange(self, worth: Tensor, grown: Tensor, gain: Tensor) -> Tensor:
        """The most valuable allowed set among ``grown``, ``(U,)`` boolean.

        Where that cannot fill the room (a large unit left, small ones came), those with the most ``gain`` do.
        """

    def plan(self, keep: Tensor) -> Plan:
        """The plan with these units kept."""


class _Limited:
    """``select`` and ``grow`` of all patterns: what ``limits`` allow."""

    keep: Tensor
    count: int
    limits: Limits | Allowance

    def select(self, worth: Tensor) -> Tensor:
        return self.limits.select(worth)

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        return self.limits.grow(keep, gain, share)

    def exchange(self, worth: Tensor, grown: Tensor, gain: Tensor) -> Tensor:
        return self.limits.exchange(worth, grown, gain)


def decided(plan: Plan, name: str) -> tuple[bool, float]:
    """Whether a ratio says how much of a layer stays, and else which share of it must."""
    if any(fnmatchcase(name, pattern) for pattern in plan.provenance.get("ratios", {})):
        return True, 0.0
    return False, float(plan.provenance.get("floor", 0.0))


class Weights(_Limited):
    """Single weights, anywhere: the number kept in all stays, and what the plan's ratios and floor say of its layers."""

    def __init__(self, plan: Plan, layout: Layout, device: torch.device) -> None:
        entries = {entry.name: entry for entry in layout.parameters}
        self._plan, self._total = plan, layout.total
        self.names = list(plan.keep)
        lost = [name for name in self.names if name not in entries]
        if lost:
            raise UsageError(f"refine: {lost[0]} is not a trained parameter of this model")
        self.places = torch.cat([torch.arange(entries[n].span.start, entries[n].span.stop, device=device) for n in self.names])
        self.keep = torch.cat([plan.keep[n].flatten() for n in self.names]).to(device)
        self.count = int(self.keep.sum())
        self.limits = self._limits(device)

    def _limits(self, device: torch.device) -> Limits:
        """A layer with a ratio is a pool of its own; the others share one, with the floor."""
        sizes = torch.tensor([self._plan.keep[n].numel() for n in self.names], device=device)
        part = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        fixed = [decided(self._plan, name) for name in self.names]
        if not any(ratio or floor for ratio, floor in fixed):
            return Limits.one(self.keep, torch.zeros_like(part))
        low = torch.tensor([ceil(floor * n) for (_, floor), n in zip(fixed, sizes.tolist(), strict=True)], device=device)
        pool = torch.tensor([1 + i if ratio else 0 for i, (ratio, _) in enumerate(fixed)], device=device)
        return Limits(self.keep, part, low, sizes, pool)

    def expand(self, units: Tensor) -> Tensor:
        return units.new_ones(self._total).index_copy(0, self.places, units)

    def gather(self, blame: Tensor, keep: Tensor) -> Tensor:
        return blame[self.places]

    def magnitude(self, theta: Tensor) -> Tensor:
        return theta[self.places].abs()

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        squares = second_moments(function, theta, batches, engine)[self.places]
        return theta[self.places].abs() * squares.sqrt()

    def plan(self, keep: Tensor) -> Plan:
        parts = keep.cpu().split([self._plan.keep[n].numel() for n in self.names])
        return replace(self._plan, keep={n: p.view(self._plan.keep[n].shape) for n, p in zip(self.names, parts, strict=True)})


def _numbered(plan: Plan, name: str, rows: int, columns: int) -> tuple[Tensor, int]:
    """Number of the tile that each weight lies in, its shape, and how many tiles there are; an output's weights are one row."""
    axis = plan.outputs(name)
    shape = plan.keep[name].movedim(axis, 0).shape
    height, width = shape[0], torch.Size(shape[1:]).numel()
    across = -(-width // columns)
    number = (torch.arange(height) // rows * across)[:, None] + torch.arange(width) // columns
    return number.view(shape).movedim(0, axis), -(-height // rows) * across


class Runs(Weights):
    """Weights inside runs of ``size`` consecutive ones of a row (N:M): every run keeps as many as the plan gives it."""

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, size: int) -> None:
        if size < 2:
            raise UsageError(f"runs of {size}: a swap needs 2 at least")
        self._size = size
        super().__init__(plan, layout, device)

    def _limits(self, device: torch.device) -> Limits:
        parts, first = [], 0
        for name in self.names:
            number, count = _numbered(self._plan, name, 1, self._size)
            parts.append(number.flatten() + first)
            first += count
        return Limits.one(self.keep, torch.cat(parts).to(device))

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """At most one more in a run."""
        gain = gain.masked_fill(keep, -torch.inf)
        order = torch.sort(gain, descending=True, stable=True).indices
        return super().grow(keep, gain.masked_fill(ranks(order, self.limits.part) > 0, -torch.inf), share)


class Tiles(_Limited):
    """Whole tiles of ``rows × columns`` weights, anywhere; those cut short by an edge change places with tiles of their size.

    Layers that the plan's ratios decide, and with a floor all layers, keep their own number.
    """

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, rows: int, columns: int) -> None:
        self._weights = Weights(plan, layout, device)
        self._plan, self._shape = plan, (rows, columns)
        tiles, first, fixed = [], 0, []
        for number, name in enumerate(self._weights.names):
            tile, count = _numbered(plan, name, rows, columns)
            tiles.append(tile.flatten() + first)
            fixed += [1 + number if any(decided(plan, name)) else 0] * count
            first += count
        self._tile = torch.cat(tiles).to(device)
        self.sizes = torch.bincount(self._tile)
        self.keep = torch.zeros(first, dtype=torch.bool, device=device).index_fill(0, self._tile[self._weights.keep], True)
        self.count = int(self.keep.sum())
        alike = torch.stack([torch.tensor(fixed, device=device), self.sizes])
        self.limits = Limits.one(self.keep, torch.unique(alike, dim=1, return_inverse=True)[1])

    def _sums(self, values: Tensor) -> Tensor:
        """``(…, W) -> (…, U)``: of weights, summed over tiles."""
        return values.new_zeros(*values.shape[:-1], len(self.sizes)).index_add_(-1, self._tile, values)

    def expand(self, units: Tensor) -> Tensor:
        return self._weights.expand(units[self._tile])

    def gather(self, blame: Tensor, keep: Tensor) -> Tensor:
        return self._sums(blame[self._weights.places])

    def magnitude(self, theta: Tensor) -> Tensor:
        return self._sums(theta[self._weights.places].square()).sqrt()

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        total = theta.new_zeros(len(self.sizes))
        for signed in _signed(function, theta, batches):
            flat = torch.cat([signed[name].flatten(2) for name in self._weights.names], 2)
            total += self._sums(flat).square().sum((0, 1))
        return total.sqrt()

    def plan(self, keep: Tensor) -> Plan:
        return self._weights.plan(keep[self._tile])


def _signed(function: ModelFunction, theta: Tensor, batches: Batches) -> Iterator[Mapping[str, Tensor]]:
    """By name ``θ ∂f`` of some samples at a time, ``(samples, targets, *parameter shape)``."""
    to_zero = Segment(0, theta, torch.zeros_like(theta), torch.zeros_like(theta))
    for x, y in batches:
        for part in attribute(function, lambda: [to_zero], x, y, rule="left", share="whole"):
            yield part.scores


class Groups(_Limited):
    """Whole units: channels, heads, blocks.

    Whole blocks, each of them alone in its group, change places with blocks of tensors of the same shapes.

    Args:
        across: between groups too: never more weights than the plan keeps, and no unit fits any more. Groups that a ratio
            decides keep their number; of the others a floor's share stays, one unit at least.
    """

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, across: bool = True) -> None:
        self._plan, self._layout = plan, layout
        self.names = list(plan.keep)
        self.sizes = [len(plan.keep[n]) for n in self.names]
        self.keep = torch.cat([plan.keep[n] for n in self.names]).to(device)
        self.count = int(self.keep.sum())
        self.limits = self._limits(device, across)
        known = {entry.name for entry in layout}
        offsets = dict(zip(self.names, torch.tensor([0, *self.sizes]).cumsum(0).tolist(), strict=False))
        # For every tensor and axis: the unit that each index belongs to, or none (the last unit, always kept).
        self._units: dict[str, list[Tensor | None]] = {}
        for key, index in plan.index.items():
            group, member = key.split("|")
            name, axis = member.rsplit("@", 1)
            if name not in known:
                raise UsageError(f"refine: {name} is not a trained parameter of this model")
            axes = self._units.setdefault(name, [None] * len(plan.shapes[name]))
            if axes[int(axis)] is None:
                axes[int(axis)] = torch.full((plan.shapes[name][int(axis)],), sum(self.sizes), device=device)
            units = torch.arange(len(index)) + offsets[group]
            along = axes[int(axis)]
            assert along is not None
            along[index.flatten().to(device)] = units.repeat_interleave(index.shape[1]).to(device)

    def _limits(self, device: torch.device, across: bool) -> Limits | Allowance:
        sizes = torch.tensor(self.sizes, device=device)
        part = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        sized = {ROUND_TO, MIN_UNITS, UNIFORM} & self._plan.provenance.keys()  # numbers of units are what was asked for
        if across and not sized and not any(self._whole(name) for name in self.names):
            now = torch.bincount(part, self.keep.double(), len(sizes)).long()
            decisions = [decided(self._plan, name) for name in self.names]
            fixed = torch.tensor([ratio for ratio, _ in decisions], device=device)
            floor = torch.tensor([max(1, ceil(f * n)) for (_, f), n in zip(decisions, self.sizes, strict=True)], device=device)
            low, high = torch.where(fixed, now, floor), torch.where(fixed, now, sizes)
            plan = self._plan
            refined = plan.given and not plan.provenance.get("edited")  # again and again, it would shrink by what does not fit
            given = torch.cat([plan.given[n] for n in self.names]).to(device) if refined else None
            return Allowance(self.keep, part, low, high, Sizes(plan, self.names), given)
        kinds: dict[Any, int] = {}
        for name in self.names:
            kinds.setdefault(self._kind(name), len(kinds))
        number = torch.tensor([kinds[self._kind(name)] for name in self.names], device=device)
        return Limits.one(self.keep, number[part])

    def _kind(self, name: str) -> Any:
        """Groups of the same kind change units: a block with those whose tensors have its shapes, others with none."""
        if not self._whole(name):
            return name
        members = [key.split("|")[1].rsplit("@", 1)[0] for key in self._plan.index if key.split("|")[0] == name]
        return tuple(sorted((m.removeprefix(name), self._plan.shapes[m], m in self._prunable) for m in members))

    @property
    def _prunable(self) -> Any:
        return self._plan.provenance["prunable"]

    def _whole(self, name: str) -> bool:
        return any(is_skip(kind) for kind in self._plan.modules.get(name, {}).get(REPLACE, {}).values())

    def _axes(self, name: str, units: Tensor) -> list[Tensor]:
        """Factors along each axis that loses units, shaped to broadcast."""
        padded = torch.cat([units, units.new_ones(1)])
        rank = len(self._plan.shapes[name])
        found = []
        for axis, owner in enumerate(self._units[name]):
            if owner is not None:
                found.append(padded[owner].view([-1 if a == axis else 1 for a in range(rank)]))
        return found

    def expand(self, units: Tensor) -> Tensor:
        parts = []
        for entry in self._layout:
            factor = units.new_ones(entry.shape)
            for along in self._axes(entry.name, units) if entry.name in self._units else ():
                factor = factor * along
            parts.append(factor.flatten())
        return torch.cat(parts)

    def gather(self, blame: Tensor, keep: Tensor) -> Tensor:
        gone = (~keep).to(blame.dtype)
        views = self._layout.views(blame)
        signed = {}
        for name in self._units:  # a weight that two removed channels hold is blamed on both, half each
            lost = torch.cat([gone, gone.new_zeros(1)])
            holders = torch.zeros(self._plan.shapes[name], dtype=blame.dtype, device=blame.device)
            for axis, owner in enumerate(self._units[name]):
                if owner is not None:
                    holders = holders + lost[owner].view([-1 if a == axis else 1 for a in range(holders.dim())])
            signed[name] = views[name] / holders.clamp_min(1)
        return self._sums(signed) * gone

    def _sums(self, signed: Mapping[str, Tensor]) -> Tensor:
        """``(..., *parameter shape) -> (..., U)``: summed over everything that belongs to a unit."""
        first = next(iter(signed.values()))
        extra = first.dim() - len(self._plan.shapes[next(iter(signed))])
        total = first.new_zeros(*first.shape[:extra], sum(self.sizes) + 1)
        for name, values in signed.items():
            for axis, owner in enumerate(self._units[name]):
                if owner is not None:
                    others = [d for d in range(extra, values.dim()) if d != axis + extra]
                    total.index_add_(extra, owner, values.sum(others) if others else values)
        return total[..., :-1]

    def magnitude(self, theta: Tensor) -> Tensor:
        """Norms over the mean norm of the layer; of a whole block, the norm itself."""
        views = self._layout.views(theta)
        norms = self._sums({n: views[n].square() for n in self._units if n in self._prunable}).sqrt()
        parts = zip(self.names, norms.split(self.sizes), strict=True)
        return torch.cat([part if self._whole(name) else part / part.mean().clamp_min(1e-30) for name, part in parts])

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        parameters = {entry.name for entry in self._layout.parameters}
        total = theta.new_zeros(sum(self.sizes))
        for part in _signed(function, theta, batches):
            signed = self._sums({n: t for n, t in part.items() if n in self._units and n in parameters})
            total += signed.square().sum((0, 1))
        if isinstance(self.limits, Allowance):
            total = total / self.limits.cost.to(total.dtype)
        return total.sqrt()

    def plan(self, keep: Tensor) -> Plan:
        parts = keep.cpu().split(self.sizes)
        return replace(self._plan, keep=dict(zip(self.names, parts, strict=True)))


SWAPS: dict[str, Callable[[Plan, Layout, torch.device], Swaps]] = {"unstructured": Weights, **dict.fromkeys(GROUPED, Groups)}
"""By the plan's structure; N:M takes ``Runs``, blocks ``Tiles``. A new structure adds its class here."""


def get_swaps(plan: Plan, layout: Layout, device: torch.device, across: bool = True) -> Swaps:
    """The pattern of a plan's structure.

    Args:
        across: whether channels and heads change places between layers too, see ``Groups``; where not, every tensor keeps its
            size, and with it MACs, bytes and latency.

    Raises:
        UsageError: the structure has none.
    """
    if plan.structure in GROUPED:
        return Groups(plan, layout, device, across)
    if plan.structure in SWAPS:
        return SWAPS[plan.structure](plan, layout, device)
    if "+" in plan.structure:
        raise UsageError(f"refine: a plan of {plan.structure} was pruned twice; refine the plan of each step")
    pattern = pattern_of(plan.structure)
    if pattern is None:
        raise UsageError(f"refine: {plan.structure} plans cannot be refined; it takes {', '.join(SWAPS)}, N:M and blocks")
    if pattern.kind == "nm":
        return Runs(plan, layout, device, pattern.second)
    return Tiles(plan, layout, device, pattern.first, pattern.second)


def swaps_inside(before: Plan, plan: Plan, layout: Layout, device: torch.device, across: bool = True) -> Swaps:
    """The swaps of a plan that was made inside ``before``, of the same structure: what that removed stays away."""
    swaps, earlier = get_swaps(plan, layout, device, across), get_swaps(before, layout, device, across)
    assert isinstance(swaps, _Limited)
    swaps.limits.close(~earlier.keep)
    return swaps
