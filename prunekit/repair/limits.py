"""Which sets of units may stay: by their number, or by the weights that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from prunekit.plan import Plan


def best(worth: Tensor, count: int) -> Tensor:
    """The ``count`` largest, ties by position, as a mask ``(U,)``.

    Nothing is sorted but a sample, whose quantiles say between which values the least that stays must lie: two comparisons of
    all, and a selection among the few in between. Where the sample misleads (many equal values), it is a selection among all.
    """
    if count <= 0:
        return torch.zeros(len(worth), dtype=torch.bool, device=worth.device)
    if count >= len(worth):
        return torch.ones(len(worth), dtype=torch.bool, device=worth.device)
    least = _least(worth, count)
    keep = worth >= least
    extra = int(keep.sum()) - count
    if extra:
        level = (worth == least).nonzero()[:, 0]
        keep[level[len(level) - extra :]] = False
    return keep


SAMPLED = 2**14
"""Values whose quantiles bound the search for a threshold."""


def _least(worth: Tensor, count: int) -> Tensor:
    """The ``count``-th largest value."""
    if len(worth) > 4 * SAMPLED:
        where = torch.randint(len(worth), (SAMPLED,), generator=torch.Generator().manual_seed(0)).to(worth.device)
        some = worth[where].sort().values
        gone = 1 - count / len(worth)
        spread = 6 * (gone * (1 - gone) * SAMPLED) ** 0.5 + 1  # six standard deviations of how many of the sample lie below
        low = some[max(0, int(gone * SAMPLED - spread))]
        high = some[min(SAMPLED - 1, int(gone * SAMPLED + spread))]
        above = worth > high
        left = count - int(above.sum())
        between = worth[(worth >= low) & ~above]
        if 0 < left <= len(between):
            return between.kthvalue(len(between) - left + 1).values
    return worth.kthvalue(len(worth) - count + 1).values


class Count:
    """So many units, wherever they are.

    Args:
        keep: the plan's choice, ``(U,)``, whose number stays.
    """

    def __init__(self, keep: Tensor) -> None:
        self.count = int(keep.sum())
        self._closed: Tensor | None = None

    def close(self, units: Tensor) -> None:
        """These units, none of them kept now, are never taken, ``(U,)`` boolean."""
        self._closed = units if self._closed is None else self._closed | units

    def select(self, worth: Tensor) -> Tensor:
        """The most valuable, ``(U,)`` boolean; ties by position."""
        return best(worth if self._closed is None else worth.masked_fill(self._closed, -torch.inf), self.count)

    def level(self, worth: Tensor) -> Tensor:
        """The least that stays: one number."""
        return _least(worth if self._closed is None else worth.masked_fill(self._closed, -torch.inf), self.count)

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """``keep`` and the units that gain most: ``share`` of the number that stays."""
        gain = gain.masked_fill(keep if self._closed is None else keep | self._closed, -torch.inf)
        return keep | best(gain, min(max(1, int(share * self.count)), int((gain > -torch.inf).sum())))

    def exchange(self, worth: Tensor, grown: Tensor, gain: Tensor) -> Tensor:
        """The most valuable of ``grown``, ``(U,)`` boolean."""
        return self.select(worth.masked_fill(~grown, -torch.inf))


class Limits:
    """How many units stay where: of every *part* between ``low`` and ``high``, of every *pool* of parts exactly as now.

    Args:
        keep: the plan's choice, ``(U,)``.
        part: of every unit, a number from 0, ``(U,)``.
        low: of every part, how many stay at least; what is above the number kept now is lowered to it.
        high: at most.
        pool: of every part, a number from 0.
    """

    def __init__(self, keep: Tensor, part: Tensor, low: Tensor, high: Tensor, pool: Tensor) -> None:
        self.part, self.pool = part, pool
        now, self.sizes = (torch.bincount(part, weights, len(low)).long() for weights in (keep.double(), None))
        self.low, self.high = torch.minimum(low, now), torch.maximum(high, now).minimum(self.sizes)
        self.counts = torch.zeros(int(pool.max()) + 1, dtype=torch.long, device=part.device).index_add_(0, pool, now)
        free = torch.zeros_like(self.counts).index_add_(0, pool, self.high - self.low)
        apart = torch.bincount(pool, minlength=len(self.counts)) > 1
        tight = (self.low == self.high) | ((free == 0) | ~apart)[pool]
        self.low, self.high = (torch.where(tight, now, limit) for limit in (self.low, self.high))
        self.tight = bool(tight.all())
        self.open = ((self.high > 0) & (self.counts[pool] > 0))[part]

    def close(self, units: Tensor) -> None:
        """These units, none of them kept now, are never taken, ``(U,)`` boolean."""
        self.open = self.open & ~units

    @classmethod
    def one(cls, keep: Tensor, part: Tensor) -> Limits:
        """Every part keeps as many as now."""
        parts = int(part.max()) + 1 if len(part) else 1
        now = torch.bincount(part, keep.double(), parts).long()
        return cls(keep, part, now, now, torch.arange(parts, device=part.device))

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """``keep`` and the units that gain most: ``share`` of the number that stays."""
        gain = gain.masked_fill(keep | ~self.open, -torch.inf)
        count = max(1, int(share * int(self.counts.sum())))
        return keep | best(gain, min(count, int((gain > -torch.inf).sum())))

    def exchange(self, worth: Tensor, grown: Tensor, gain: Tensor) -> Tensor:
        """The most valuable of ``grown``, ``(U,)`` boolean."""
        return self.select(worth.masked_fill(~grown, -torch.inf))

    def select(self, worth: Tensor) -> Tensor:
        """The most valuable allowed set, ``(U,)`` boolean; ties by position.

        Units of minus infinity are left out as long as the others hold a set that is allowed.
        """
        worth = worth.masked_fill(~self.open, -torch.inf)
        if self.tight and len(self.low) == 1:
            return best(worth, int(self.low))
        order = torch.sort(worth, descending=True, stable=True).indices
        place = ranks(order, self.part)
        forced = place < self.low[self.part]
        if self.tight:
            return forced
        barred = place >= self.high[self.part]
        turn = torch.where(forced, 0, torch.where(barred, 2, 1))
        order = order[torch.sort(turn[order], stable=True).indices]
        pool = self.pool[self.part]
        return (ranks(order, pool) < self.counts[pool]) & ~barred

    def level(self, worth: Tensor) -> Tensor:
        """Half-way between the least that stays and the largest that goes, of every unit's pool: ``(U,)``."""
        pool, keep = self.pool[self.part], self.select(worth)
        ends = [
            torch.full((len(self.counts),), end, dtype=worth.dtype, device=worth.device).scatter_reduce(
                0, pool, worth.masked_fill(part, end), how
            )
            for part, end, how in ((~keep, torch.inf, "amin"), (keep, -torch.inf, "amax"))
        ]
        return ((ends[0] + ends[1]) / 2)[pool]


def ranks(order: Tensor, part: Tensor) -> Tensor:
    """Place of every unit inside its part, in that order, ``(U,)``."""
    order = order[torch.sort(part[order], stable=True).indices]
    sizes = torch.bincount(part)
    first = sizes.cumsum(0) - sizes
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - first[part[order]]
    return places


class Sizes:
    """How many weights stay, by how many units of every group do: a tensor keeps the product of its axes.

    A whole block is one more axis, of length 1, of every tensor that it holds.

    Args:
        groups: their names, in the order in which units are counted.
    """

    def __init__(self, plan: Plan, groups: Sequence[str]) -> None:
        number = {name: g for g, name in enumerate(groups)}
        blocks: dict[str, dict[int, dict[int, int]]] = {}
        for key, index in plan.index.items():
            group, member = key.split("|")
            name, axis = member.rsplit("@", 1)
            if plan.block(group) is None:
                blocks.setdefault(name, {}).setdefault(int(axis), {})[number[group]] = index.shape[1]
            else:
                blocks.setdefault(name, {}).setdefault(len(plan.shapes[name]), {})[number[group]] = 1
        self._units = [len(plan.keep[name]) for name in groups]
        prunable, buffers = set(plan.provenance["prunable"]), set(plan.provenance.get("buffers", ()))
        self._tensors = []
        for name, axes in blocks.items():
            shape = (*plan.shapes[name], 1)
            rest = prod(length for axis, length in enumerate(shape) if axis not in axes)
            self._tensors.append((name in prunable, name not in buffers, rest, shape, axes))

    def __call__(self, kept: Sequence[int]) -> tuple[int, int]:
        """Prunable weights and all parameters that stay of the tensors that groups touch.

        Args:
            kept: units by group.
        """
        gone = [units - stay for units, stay in zip(self._units, kept, strict=True)]
        prunable = parameters = 0
        for may_go, trained, rest, shape, axes in self._tensors:
            size = rest
            for axis, blocks in axes.items():
                size *= shape[axis] - sum(block * gone[group] for group, block in blocks.items())
            prunable += may_go * size
            parameters += trained * size
        return prunable, parameters

    def costs(self, share: float) -> list[int]:
        """Prunable weights that one more unit of every group holds, where about ``share`` of the units stay."""
        about = [max(1, round(share * units)) for units in self._units]
        most = self(about)[0]
        return [most - self([n - (g == group) for g, n in enumerate(about)])[0] for group in range(len(about))]


class Allowance:
    """Units of all parts for one another: never more prunable weights than now, nor parameters, and no room for one unit more.

    Args:
        keep: the plan's choice, ``(U,)``.
        part: the group of every unit, ``(U,)``.
        low, high: how many units of every part stay at least, and at most.
        sizes: weights by units kept.
        cost: weights that a unit holds, ``(U,)``.
        given: the choice whose weights count instead of ``keep``'s, which fills their room only nearly, ``(U,)``.
    """

    def __init__(
        self, keep: Tensor, part: Tensor, low: Tensor, high: Tensor, sizes: Sizes, cost: Tensor, given: Tensor | None = None
    ) -> None:
        now, first = (torch.bincount(part, k.double(), len(low)).long() for k in (keep, keep if given is None else given))
        self.part, self.low, self.high = part, torch.minimum(low, now), torch.maximum(high, now)
        self.sizes = sizes
        self.most = tuple(map(max, sizes(now.tolist()), sizes(first.tolist())))
        self.open = (self.high > 0)[part]
        self.cost = cost

    def close(self, units: Tensor) -> None:
        """These units, none of them kept now, are never taken, ``(U,)`` boolean."""
        self.open = self.open & ~units

    def select(self, worth: Tensor) -> Tensor:
        """The most valuable units, as many as there is room for, ``(U,)`` boolean; those of minus infinity only up to ``low``.

        In order of worth up to the first that does not fit; then whichever of the others still does.
        """
        keep, order, fitting = self._in_order(worth)
        return self._filled(keep.index_fill(0, order[:fitting], True), order[fitting:])

    def _in_order(self, worth: Tensor) -> tuple[Tensor, Tensor, int]:
        """What must stay, ``(U,)`` boolean; the others in order of worth; and how many of them there is room for in a row."""
        worth = worth.masked_fill(~self.open, -torch.inf)
        order = torch.sort(worth, descending=True, stable=True).indices
        place = ranks(order, self.part)
        keep = place < self.low[self.part]
        wanted = ~keep & (place < self.high[self.part]) & (worth > -torch.inf)
        order = order[wanted[order]]
        base = torch.bincount(self.part[keep], minlength=len(self.low))
        fitting, above = 0, len(order) + 1
        while above - fitting > 1:
            half = (fitting + above) // 2
            taken = base + torch.bincount(self.part[order[:half]], minlength=len(base))
            fitting, above = (half, above) if self._fits(taken.tolist()) else (fitting, half)
        return keep, order, fitting

    def level(self, worth: Tensor) -> Tensor:
        """The worth down to which there is room for all: one number."""
        keep, order, fitting = self._in_order(worth)
        return worth[order[fitting - 1]] if fitting else worth[keep].min() if keep.any() else worth.max()

    def exchange(self, worth: Tensor, grown: Tensor, gain: Tensor) -> Tensor:
        """The most valuable of ``grown``; the room that they leave goes to what gains most for its weights."""
        keep = self.select(worth.masked_fill(~grown, -torch.inf))
        order = torch.sort(gain / self.cost.to(gain.dtype), descending=True, stable=True).indices
        return self._filled(keep, order[(self.open & ~keep)[order]])

    def _filled(self, keep: Tensor, order: Tensor) -> Tensor:
        """``keep`` and whichever units of ``order`` still fit, one after the other."""
        keep = keep.clone()
        counts: list[int] = torch.bincount(self.part[keep], minlength=len(self.low)).tolist()
        high = self.high.tolist()
        full = {part for part, count in enumerate(counts) if count >= high[part]}
        for unit, part in zip(order.tolist(), self.part[order].tolist(), strict=True):
            if part in full:
                continue
            counts[part] += 1
            if self._fits(counts):
                keep[unit] = True
            else:
                counts[part] -= 1
            if not keep[unit] or counts[part] >= high[part]:
                full.add(part)
                if len(full) == len(counts):
                    break
        return keep

    def _fits(self, counts: Sequence[int]) -> bool:
        return all(size <= most for size, most in zip(self.sizes(counts), self.most, strict=True))

    def grow(self, keep: Tensor, gain: Tensor, share: float) -> Tensor:
        """``keep`` and the units that gain most for the weights they hold: ``share`` of all that stay, or of ten large units."""
        gain = (gain / self.cost.to(gain.dtype)).masked_fill(keep | ~self.open, -torch.inf)
        order = torch.sort(gain, descending=True, stable=True).indices
        order = order[gain[order] > -torch.inf]
        room = share * max(self.most[0], 10 * float(self.cost.max()))
        count = max(1, int((self.cost[order].cumsum(0) <= room).sum()))
        return keep.index_fill(0, order[:count], True)
