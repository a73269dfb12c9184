"""Swaps of whole units: channels, heads, neurons, experts, blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction
from prunekit.kernel.blame import Batches, add_up
from prunekit.kernel.gradients import MomentEngine
from prunekit.plan import Plan
from prunekit.plan.channels import STACK
from prunekit.plan.plan import MIN_UNITS, ROUND_TO, UNIFORM
from prunekit.repair.limited import Limited, contributions, decided
from prunekit.repair.limits import Allowance, Limits, Sizes
from prunekit.structure.stand_ins import Wanted
from prunekit.trajectory import Layout


class Groups(Limited):
    """Whole units: channels, heads, blocks.

    Where they are all that goes, whole blocks, each of them alone in its group, change places with blocks of tensors of the same
    shapes. Among units of several kinds they are units as others are, of as many weights as are left in them.

    Experts change places with others of their mixture. They are scaled, and their rows of the router are not: tokens go where the
    dense router sends them, so that an expert that is gone has a gradient, which says what giving it back would do.

    Args:
        across: between groups too: never more weights than the plan keeps, and no unit fits any more. Groups that a ratio
            decides keep their number; of the others a floor's share stays, one unit at least (blocks change nothing then).
    """

    def __init__(self, plan: Plan, layout: Layout, device: torch.device, across: bool = True) -> None:
        self._plan, self._layout = plan, layout
        self.names = list(plan.keep)
        self.sizes = [len(plan.keep[n]) for n in self.names]
        self.keep = torch.cat([plan.keep[n] for n in self.names]).to(device)
        self.count = int(self.keep.sum())
        self.limits = self._limits(device, across)
        known, routers = {entry.name for entry in layout}, plan.routers
        offsets = dict(zip(self.names, torch.tensor([0, *self.sizes]).cumsum(0).tolist(), strict=False))
        # For every tensor and axis: the unit that each index belongs to, or none (the last unit, always kept); behind the axes,
        # the block that all of the tensor belongs to.
        self._units: dict[str, list[Tensor | None]] = {}
        for key, index in plan.index.items():
            group, member = key.split("|")
            name, axis = member.rsplit("@", 1)
            if name.rpartition(".")[0] in routers:
                continue
            if name not in known:
                raise UsageError(f"refine: {name} is not a trained parameter of this model")
            axes = self._units.setdefault(name, [None] * (len(plan.shapes[name]) + 1))
            if plan.block(group) is not None:
                axes[-1] = torch.tensor([offsets[group]], device=device)
                continue
            if axes[int(axis)] is None:
                axes[int(axis)] = torch.full((plan.shapes[name][int(axis)],), sum(self.sizes), device=device)
            units = torch.arange(len(index)) + offsets[group]
            along = axes[int(axis)]
            assert along is not None
            along[index.flatten().to(device)] = units.repeat_interleave(index.shape[1]).to(device)

    def _limits(self, device: torch.device, across: bool) -> Limits | Allowance:
        sizes = torch.tensor(self.sizes, device=device)
        part = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        costs = Sizes(self._plan, self.names).costs(float(self.keep.double().mean()))
        self.cost = torch.tensor(costs, dtype=torch.float64, device=device).clamp_min(1)[part]
        sized = {ROUND_TO, MIN_UNITS, UNIFORM} & self._plan.provenance.keys()  # numbers of units are what was asked for
        whole = [self._plan.block(name) is not None for name in self.names]
        if across and not sized and not all(whole) and not self._plan.routers:
            now = torch.bincount(part, self.keep.double(), len(sizes)).long()
            decisions = [decided(self._plan, STACK if block else name) for name, block in zip(self.names, whole, strict=True)]
            fixed = torch.tensor([f or (b and r > 0) for (f, r), b in zip(decisions, whole, strict=True)], device=device)
            least = [0 if b else max(1, ceil(f * n)) for (_, f), n, b in zip(decisions, self.sizes, whole, strict=True)]
            floor = torch.tensor(least, device=device)
            low, high = torch.where(fixed, now, floor), torch.where(fixed, now, sizes)
            plan = self._plan
            refined = plan.given and not plan.provenance.get("edited")  # again and again, it would shrink by what does not fit
            given = torch.cat([plan.given[n] for n in self.names]).to(device) if refined else None
            return Allowance(self.keep, part, low, high, Sizes(plan, self.names), self.cost, given)
        kinds: dict[Any, int] = {}
        for name in self.names:
            kinds.setdefault(self._kind(name), len(kinds))
        number = torch.tensor([kinds[self._kind(name)] for name in self.names], device=device)
        return Limits.one(self.keep, number[part])

    def _kind(self, name: str) -> Any:
        """Groups of the same kind change units: a block with those whose tensors have its shapes, others with none.

        Of what leaves inside a block, as much must be left in both.
        """
        plan, block = self._plan, self._plan.block(name)
        if block is None:
            return name
        members = [key.split("|") for key in plan.index]
        own = {member.rsplit("@", 1)[0] for group, member in members if group == name}
        inside = {(group, member) for group, member in members if group != name and member.rsplit("@", 1)[0] in own}
        return (
            *sorted((m.removeprefix(block), tuple(plan.shapes[m]), m in self._prunable) for m in own),
            *sorted((m.removeprefix(block), int(plan.keep[group].sum())) for group, m in inside),
        )

    @property
    def _prunable(self) -> Any:
        return self._plan.provenance["prunable"]

    def _axes(self, name: str, units: Tensor) -> list[Tensor]:
        """Factors along each axis that loses units, and of the block, shaped to broadcast."""
        padded = torch.cat([units, units.new_ones(1)])
        rank = len(self._plan.shapes[name])
        found = []
        for axis, owner in enumerate(self._units[name]):
            if owner is not None:
                found.append(padded[owner].view([-1 if a == axis else 1 for a in range(rank)]))
        return found

    spans: Mapping[str, slice] | None = None

    def scaled(self) -> Sequence[str]:
        return list(self._units)

    def factor(self, name: str, units: Tensor) -> Tensor:
        return prod(self._axes(name, units), start=units.new_ones(()))

    def add(self, name: str, signed: Tensor, units: Tensor, into: Tensor) -> None:
        axes = iter(self._axes(name, units))
        along = {axis: next(axes) for axis, owner in enumerate(self._units[name]) if owner is not None}
        for axis, owner in enumerate(self._units[name]):
            if owner is not None:
                product = prod((factor for other, factor in along.items() if other != axis), start=signed)
                found = _along(axis, product)
                mine = owner < len(into)  # the last one stands for indices of no unit
                into.index_add_(0, owner[mine], found[mine])

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
                    total.index_add_(extra, owner, _along(axis, values, extra))
        return total[..., :-1]

    def magnitude(self, theta: Tensor) -> Tensor:
        """Norms over the mean norm of the layer; of a whole block, over that of all blocks."""
        views = self._layout.views(theta)
        norms = self._sums({n: views[n].square() for n in self._units if n in self._prunable}).sqrt()
        parts = dict(zip(self.names, norms.split(self.sizes), strict=True))
        blocks = [part for name, part in parts.items() if self._plan.block(name) is not None]
        stack = torch.cat(blocks).mean() if blocks else None
        means = {name: part.mean() if stack is None or self._plan.block(name) is None else stack for name, part in parts.items()}
        return torch.cat([part / means[name].clamp_min(1e-30) for name, part in parts.items()])

    def per_weight(self, total: Tensor) -> Tensor:
        return total / (self.cost / self.cost.mean()).to(total.dtype)

    def influence(self, function: ModelFunction, engine: MomentEngine, theta: Tensor, batches: Batches) -> Tensor:
        parameters = {entry.name for entry in self._layout.parameters}
        total = theta.new_zeros(sum(self.sizes))
        for part in contributions(function, theta, batches):
            signed = self._sums({n: t for n, t in part.items() if n in self._units and n in parameters})
            total += signed.square().sum((0, 1))
        add_up(batches, total)
        return (self.per_weight(total) if isinstance(self.limits, Allowance) else total).sqrt()

    def stand_ins(self, keep: Tensor) -> Wanted:
        return self.plan(keep).stand_ins()

    def plan(self, keep: Tensor) -> Plan:
        parts = keep.cpu().split(self.sizes)
        return replace(self._plan, keep=dict(zip(self.names, parts, strict=True)))


def _along(axis: int, values: Tensor, extra: int = 0) -> Tensor:
    """``(..., *shape) -> (..., length of the axis)``: sums over all others; behind the last axis, over all, as a length of 1."""
    others = [d for d in range(extra, values.dim()) if d != axis + extra]
    summed = values.sum(others) if others else values
    return summed if axis + extra < values.dim() else summed[..., None]
