"""Swaps of single weights: anywhere, inside runs of M, or whole tiles of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, second_moments
from prunekit.kernel.blame import Batches, add_up
from prunekit.kernel.gradients import MomentEngine
from prunekit.plan import Plan
from prunekit.repair.limited import Limited, contributions, decided
from prunekit.repair.limits import Count, Limits, ranks
from prunekit.trajectory import Layout


class Weights(Limited):
    """Single weights, anywhere: the number kept in all stays, and what the plan's ratios and floor say of its layers."""

    spans: Mapping[str, slice]

    def __init__(self, plan: Plan, layout: Layout, device: torch.device) -> None:
        entries = {entry.name: entry for entry in layout.parameters}
        self._plan, self._total = plan, layout.total
        self.names = list(plan.keep)
        lost = [name for name in self.names if name not in entries]
        if lost:
            raise UsageError(f"refine: {lost[0]} is not a trained parameter of this model")
        self._places = [entries[n].span for n in self.names]
        self._device = device
        self.keep = torch.cat([plan.keep[n].flatten() for n in self.names]).to(device)
        self.count = int(self.keep.sum())
        ends = [0, *accumulate(plan.keep[n].numel() for n in self.names)]
        self.spans = {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.names)}

    @cached_property
    def places(self) -> Tensor:
        """Coordinate of every unit, ``(U,)``; eight bytes each, which learning does not need."""
        return torch.cat([torch.arange(span.start, span.stop, device=self._device) for span in self._places])

    @cached_property
    def limits(self) -> Count | Limits:  # type: ignore[override]
        return self._limits(self._device)

    def _limits(self, device: torch.device) -> Count | Limits:
        """A layer with a ratio is a pool of its own; the others share one, with the floor."""
        fixed = [decided(self._plan, name) for name in self.names]
        if not any(ratio or floor for ratio, floor in fixed):
            return Count(self.keep)
        sizes = torch.tensor([self._plan.keep[n].numel() for n in self.names], device=device)
        part = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        low = torch.tensor([ceil(floor * n) for (_, floor), n in zip(fixed, sizes.tolist(), strict=True)], device=device)
        pool = torch.tensor([1 + i if ratio else 0 for i, (ratio, _) in enumerate(fixed)], device=device)
        return Limits(self.keep, part, low, sizes, pool)

    def scaled(self) -> Sequence[str]:
        return self.names

    def factor(self, name: str, units: Tensor) -> Tensor:
        return units[self.spans[name]].view(self._plan.keep[name].shape)

    def add(self, name: str, signed: Tensor, units: Tensor, into: Tensor) -> None:
        into[self.spans[name]] += signed.flatten()

    def levels(self, worth: Tensor) -> Callable[[str], Tensor]:
        found = self.limits.level(worth)
        return lambda name: found if found.dim() == 0 else self.factor(name, found)

    def expand(self, units: Tensor) -> Tensor:
        return units.new_ones(self._total).index_copy(0, self.places, units)

    def gather(self, blame: Tensor, keep: Tensor) -> Tensor:
        return blame[self.places]

    def magnitude(self, theta: Tensor) -> Tensor:
        found = theta.new_empty(len(self.keep))
        for place, span in zip(self._places, self.spans.values(), strict=True):  # ``places`` would be eight bytes a unit
            torch.abs(theta[place], out=found[span])
        return found

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        squares = second_moments(function, theta, batches, engine)[self.places]
        return theta[self.places].abs() * squares.sqrt()

    def plan(self, keep: Tensor) -> Plan:
        parts = keep.cpu().split([self._plan.keep[n].numel() for n in self.names])
        return replace(self._plan, keep={n: p.view(self._plan.keep[n].shape) for n, p in zip(self.names, parts, strict=True)})


def numbered(plan: Plan, name: str, rows: int, columns: int) -> tuple[Tensor, int]:
    """Number of the tile that each weight lies in, its shape, and how many tiles there are; an output's weights are one row."""
    axis = plan.outputs(name)
    shape = plan.keep[name].movedim(axis, 0).shape
    height, width = shape[0], torch.Size(shape[1:]).numel()
    across = -(-width // columns)
    number = (torch.arange(height) // rows * across)[:, None] + torch.arange(width) // columns
    return number.view(shape).movedim(0, axis), -(-height // rows) * across


PAIRWISE = 16
"""Runs up to this long are ranked by comparing every two of their weights, which takes no sort."""


class Runs(Weights):
    """Weights inside runs of ``size`` consecutive ones of a row (N:M): every run keeps as many as the plan gives it."""

    _closed: Tensor | None

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, size: int) -> None:
        if size < 2:
            raise UsageError(f"runs of {size}: a swap needs 2 at least")
        self._size, self._closed = size, None
        super().__init__(plan, layout, device)

    def _limits(self, device: torch.device) -> Limits:
        parts, first = [], 0
        for name in self.names:
            number, count = numbered(self._plan, name, 1, self._size)
            parts.append(number.flatten() + first)
            first += count
        return Limits.one(self.keep, torch.cat(parts).to(device))

    def select(self, worth: Tensor) -> Tensor:
        """Of every run its most valuable, ties by position: a weight stays where fewer of its run come before it than stay."""
        if self._closed is not None:
            worth = worth.masked_fill(self._closed, -torch.inf)
        keep = torch.empty(len(worth), dtype=torch.bool, device=worth.device)
        for name in self.names:
            runs = self._runs(name, worth[self.spans[name]], -torch.inf)
            if self._size <= PAIRWISE:
                before = torch.zeros(runs.shape, dtype=torch.uint8, device=worth.device)
                for other in range(self._size):
                    rival = runs[..., other : other + 1]
                    before += rival > runs
                    before[..., other + 1 :] += rival == runs[..., other + 1 :]
            else:
                before = runs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            keep[self.spans[name]] = self._flat(name, before < self._stay[name])
        return keep

    def levels(self, worth: Tensor) -> Callable[[str], Tensor]:
        """Half-way between the least of a run that stays and the largest that goes."""
        keep = self.select(worth)

        def of(name: str) -> Tensor:
            span = self.spans[name]
            runs, kept = self._runs(name, worth[span], -torch.inf), self._runs(name, keep[span], False)
            low = runs.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            high = runs.masked_fill(kept, -torch.inf).amax(-1, keepdim=True)
            middle: Tensor = ((low + high) / 2).expand(runs.shape)
            return self._flat(name, middle).view(self._plan.keep[name].shape)

        return of

    def close(self, units: Tensor) -> None:
        """These units, none of them kept now, are never taken, ``(U,)`` boolean."""
        self._closed = units if self._closed is None else self._closed | units
        self.limits.close(units)

    @cached_property
    def _stay(self) -> dict[str, Tensor]:
        """How many of every run stay, ``(outputs, runs, 1)``."""
        return {n: self._runs(n, self.keep[self.spans[n]], False).sum(-1, keepdim=True, dtype=torch.uint8) for n in self.names}

    def _runs(self, name: str, flat: Tensor, fill: float | bool) -> Tensor:
        """``(outputs, runs, size)``; what the last run of a row lacks is ``fill``."""
        rows = flat.view(self._plan.keep[name].shape).movedim(self._plan.outputs(name), 0).flatten(1)
        return F.pad(rows, (0, -rows.shape[1] % self._size), value=fill).view(len(rows), -1, self._size)

    def _flat(self, name: str, runs: Tensor) -> Tensor:
        """A tensor's entries in their order, from its runs."""
        axis = self._plan.outputs(name)
        shape = torch.zeros(self._plan.keep[name].shape, device="meta").movedim(axis, 0).shape
        width = torch.Size(shape[1:]).numel()
        return runs.flatten(1)[:, :width].reshape(shape).movedim(0, axis).flatten()

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """At most one more in a run."""
        assert isinstance(self.limits, Limits)
        gain = gain.masked_fill(keep, -torch.inf)
        order = torch.sort(gain, descending=True, stable=True).indices
        return super().grow(keep, gain.masked_fill(ranks(order, self.limits.part) > 0, -torch.inf), share)


class Tiles(Limited):
    """Whole tiles of ``rows × columns`` weights, anywhere; those cut short by an edge change places with tiles of their size.

    Layers that the plan's ratios decide, and with a floor all layers, keep their own number.
    """

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, rows: int, columns: int) -> None:
        self._weights = Weights(plan, layout, device)
        self._plan, self._shape = plan, (rows, columns)
        tiles, first, fixed = [], 0, []
        for number, name in enumerate(self._weights.names):
            tile, count = numbered(plan, name, rows, columns)
            tiles.append(tile.flatten() + first)
            fixed += [1 + number if any(decided(plan, name)) else 0] * count
            first += count
        self._tile = torch.cat(tiles).to(device)
        self.sizes = torch.bincount(self._tile)
        self.keep = torch.zeros(first, dtype=torch.bool, device=device).index_fill(0, self._tile[self._weights.keep], True)
        self.count = int(self.keep.sum())
        alike = torch.stack([torch.tensor(fixed, device=device), self.sizes])
        self.limits = Limits.one(self.keep, torch.unique(alike, dim=1, return_inverse=True)[1])

    spans: None = None

    def scaled(self) -> Sequence[str]:
        return self._weights.names

    def factor(self, name: str, units: Tensor) -> Tensor:
        return units[self._tile[self._weights.spans[name]]].view(self._plan.keep[name].shape)

    def add(self, name: str, signed: Tensor, units: Tensor, into: Tensor) -> None:
        into.index_add_(0, self._tile[self._weights.spans[name]], signed.flatten())

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
        for signed in contributions(function, theta, batches):
            flat = torch.cat([signed[name].flatten(2) for name in self._weights.names], 2)
            total += self._sums(flat).square().sum((0, 1))
        add_up(batches, total)
        return total.sqrt()

    def plan(self, keep: Tensor) -> Plan:
        return self._weights.plan(keep[self._tile])
