"""What may be swapped for what: single weights, weights inside blocks of M, whole channels. One small class each.

Everything a repair needs of a pruning pattern is how its *units* (weights, or channels) lie in the model's flat
coordinates ``(P,)``, and which sets of units are allowed. Units are one flat vector ``(U,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, attribute, second_moments
from prunekit.kernel.blame import Batches
from prunekit.kernel.gradients import MomentEngine
from prunekit.plan import Plan
from prunekit.trajectory import Layout, Segment


class Pattern(Protocol):
    """``keep``: the plan's own choice, boolean ``(U,)``; ``importance``: the target whose gradients rank what goes."""

    keep: Tensor
    importance: str

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
        """The most valuable allowed set of as many units as the plan keeps, ``(U,)`` boolean."""

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """``keep`` and the removed units that gain most: ``share`` of the number kept, one at least, as far as allowed.

        A unit whose gain is minus infinity stays away.
        """

    def plan(self, keep: Tensor) -> Plan:
        """The plan with these units kept."""


def best(worth: Tensor, count: int) -> Tensor:
    """The ``count`` largest, ties by position, as a mask."""
    keep = torch.zeros(len(worth), dtype=torch.bool, device=worth.device)
    keep[torch.sort(worth, descending=True, stable=True).indices[:count]] = True
    return keep


def _grown(keep: Tensor, gain: Tensor, count: int) -> Tensor:
    """``count`` more units, those removed ones that gain most; never one whose gain is minus infinity."""
    gain = gain.masked_fill(keep, -torch.inf)
    return keep | best(gain, min(count, int((gain > -torch.inf).sum())))


class Weights:
    """Single weights, anywhere: the number kept in all stays."""

    importance = "margin"

    def __init__(self, plan: Plan, layout: Layout, device: torch.device) -> None:
        entries = {entry.name: entry for entry in layout.parameters}
        self._plan, self._total = plan, layout.total
        self.names = list(plan.keep)
        lost = [name for name in self.names if name not in entries]
        if lost:
            raise UsageError(f"refine: {lost[0]} is not a trained parameter of this model")
        self._places = torch.cat([torch.arange(layout.total, device=device)[entries[n].span] for n in self.names])
        self.keep = torch.cat([plan.keep[n].flatten() for n in self.names]).to(device)
        self.count = int(self.keep.sum())

    def expand(self, units: Tensor) -> Tensor:
        return units.new_ones(self._total).index_copy(0, self._places, units)

    def gather(self, blame: Tensor, keep: Tensor) -> Tensor:
        return blame[self._places]

    def magnitude(self, theta: Tensor) -> Tensor:
        return theta[self._places].abs()

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        squares = second_moments(function, theta, batches, engine)[self._places]
        return theta[self._places].abs() * squares.sqrt()

    def select(self, worth: Tensor) -> Tensor:
        return best(worth, self.count)

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        return _grown(keep, gain, max(1, int(share * self.count)))

    def plan(self, keep: Tensor) -> Plan:
        parts = keep.cpu().split([self._plan.keep[n].numel() for n in self.names])
        return replace(self._plan, keep={n: p.view(self._plan.keep[n].shape) for n, p in zip(self.names, parts, strict=True)})


class Blocks(Weights):
    """Weights inside blocks of ``size`` consecutive inputs: every block keeps as many as the plan gives it (N:M).

    Inputs are axis 1; a parameter whose axis 1 is no multiple of ``size`` is refused.
    """

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, size: int) -> None:
        super().__init__(plan, layout, device)
        if size < 2:
            raise UsageError(f"blocks of {size}: a swap needs 2 at least")
        blocks, first = [], 0
        for name in self.names:
            shape = plan.keep[name].shape
            if len(shape) < 2 or shape[1] % size:
                raise UsageError(f"blocks of {size}: {name} has shape {tuple(shape)}, its axis 1 is no multiple of {size}")
            numbers = torch.arange(first, first + shape.numel()).view(shape)
            blocks.append(numbers.movedim(1, -1).reshape(-1, size))
            first += shape.numel()
        self._blocks = torch.cat(blocks).to(device)
        self._counts = self.keep[self._blocks].sum(1, keepdim=True)

    def select(self, worth: Tensor) -> Tensor:
        order = torch.sort(worth[self._blocks], dim=1, descending=True, stable=True).indices
        chosen = torch.arange(order.shape[1], device=worth.device) < self._counts
        keep = torch.zeros_like(self.keep)
        keep[self._blocks.gather(1, order)] = chosen
        return keep

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        candidates = gain.masked_fill(keep, -torch.inf)[self._blocks]
        top, where = candidates.max(1)
        top = top.masked_fill(self._counts[:, 0] == 0, -torch.inf)  # nothing in it could leave in return
        count = min(max(1, int(share * self.count)), int((top > -torch.inf).sum()))
        chosen = best(top, count)
        grown = keep.clone()
        grown[self._blocks[chosen, where[chosen]]] = True
        return grown


class Channels:
    """Whole channels. ``across=False`` swaps inside a layer only, so that every tensor keeps its size.

    With ``across`` the number of channels in all stays, and every layer keeps at least half of its uniform share: a
    layer that dies has no gradients that could bring it back.
    """

    importance = "loss"

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, across: bool = False) -> None:
        self._plan, self._layout = plan, layout
        self.names = list(plan.keep)
        self.sizes = [len(plan.keep[n]) for n in self.names]
        self.keep = torch.cat([plan.keep[n] for n in self.names]).to(device)
        self.count = int(self.keep.sum())
        kept = [int(plan.keep[n].sum()) for n in self.names]
        share = self.count / sum(self.sizes)
        self._lowest = [max(1, int(share * size / 2)) for size in self.sizes] if across else kept
        if across and sum(self._lowest) > self.count:
            self._lowest = [1] * len(kept)
        offsets = dict(zip(self.names, torch.tensor([0, *self.sizes]).cumsum(0).tolist(), strict=False))
        # For every parameter and axis: the unit that each index belongs to, or none (the last unit, always kept).
        self._units: dict[str, list[Tensor | None]] = {}
        for key, index in plan.index.items():
            group, member = key.split("|")
            name, axis = member.rsplit("@", 1)
            axes = self._units.setdefault(name, [None] * len(plan.shapes[name]))
            if axes[int(axis)] is None:
                axes[int(axis)] = torch.full((plan.shapes[name][int(axis)],), sum(self.sizes), device=device)
            units = torch.arange(len(index)) + offsets[group]
            along = axes[int(axis)]
            assert along is not None
            along[index.flatten().to(device)] = units.repeat_interleave(index.shape[1]).to(device)

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
        views = self._layout.views(theta)
        prunable = self._plan.provenance["prunable"]
        norms = self._sums({n: views[n].square() for n in self._units if n in prunable}).sqrt()
        return torch.cat([part / part.mean().clamp_min(1e-30) for part in norms.split(self.sizes)])

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        to_zero = Segment(0, theta, torch.zeros_like(theta), torch.zeros_like(theta))
        parameters = {entry.name for entry in self._layout.parameters}
        total = theta.new_zeros(sum(self.sizes))
        for x, y in batches:
            for part in attribute(function, lambda: [to_zero], x, y, rule="left", share="whole"):
                signed = self._sums({n: t for n, t in part.scores.items() if n in self._units and n in parameters})
                total += signed.square().sum((0, 1))
        return total.sqrt()

    def select(self, worth: Tensor) -> Tensor:
        keep = torch.cat([best(w, low) for w, low in zip(worth.split(self.sizes), self._lowest, strict=True)])
        left = self.count - int(keep.sum())
        rest = worth.masked_fill(keep, -torch.inf)
        return keep | best(rest, left)

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        missing = [
            best(g.masked_fill(k, -torch.inf), max(0, low - int(k.sum())))
            for g, k, low in zip(gain.split(self.sizes), keep.split(self.sizes), self._lowest, strict=True)
        ]
        return _grown(keep | torch.cat(missing), gain, max(1, int(share * self.count)))

    def plan(self, keep: Tensor) -> Plan:
        parts = keep.cpu().split(self.sizes)
        return replace(self._plan, keep=dict(zip(self.names, parts, strict=True)))


PATTERNS: dict[str, Callable[[Plan, Layout, torch.device], Pattern]] = {"unstructured": Weights, "channels": Channels}
"""By the plan's structure; a new structure adds its class here."""


def get_pattern(plan: Plan, layout: Layout, device: torch.device, **options: Any) -> Pattern:
    """The pattern of a plan's structure.

    Raises:
        UsageError: the structure has none.
    """
    if plan.structure not in PATTERNS:
        raise UsageError(f"refine: {plan.structure} plans cannot be refined yet; it takes {', '.join(PATTERNS)}")
    return PATTERNS[plan.structure](plan, layout, device, **options)
