"""What may be swapped for what: weights, tiles of them, weights inside runs of M, channels, heads, blocks. One class each.

Everything a repair needs of a pruning pattern is how its *units* (weights, tiles, channels, …) lie in the model's flat
coordinates ``(P,)`` and in its tensors, and which sets of units are allowed. Units are one flat vector ``(U,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction
from prunekit.kernel.blame import Batches
from prunekit.kernel.gradients import MomentEngine
from prunekit.plan import Plan
from prunekit.repair.limited import Limited
from prunekit.repair.units import Groups
from prunekit.repair.weights import Runs, Tiles, Weights
from prunekit.structure import GROUPED, pattern_of
from prunekit.structure.stand_ins import Wanted
from prunekit.trajectory import Layout

__all__ = ["SWAPS", "Groups", "Runs", "Swaps", "Tiles", "Weights", "get_swaps", "swaps_inside"]


class Swaps(Protocol):
    """``keep``: the plan's own choice, boolean ``(U,)``."""

    keep: Tensor

    def expand(self, units: Tensor) -> Tensor:
        """Factors of the model's coordinates, ``(U,) -> (P,)``; differentiable."""

    @property
    def spans(self) -> Mapping[str, slice] | None:
        """Where units are single weights: those of every tensor, in its order. None where they are more than that."""

    def scaled(self) -> Sequence[str]:
        """Names of the tensors that units scale."""

    def factor(self, name: str, units: Tensor) -> Tensor:
        """What units ``(U,)`` scale a tensor by, broadcast to its shape."""

    def add(self, name: str, signed: Tensor, units: Tensor, into: Tensor) -> None:
        """``into += ∂ Σ signed · factor(name, units) / ∂ units``, ``(U,)``; ``signed`` has the tensor's shape."""

    def per_weight(self, total: Tensor) -> Tensor:
        """Sums over units, ``(U,)``, over the weights that a unit holds; on average they stay as they are."""

    def level(self, worth: Tensor) -> Tensor:
        """The worth from which units stay, one number or ``(U,)``."""

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

    def stand_ins(self, keep: Tensor) -> Wanted:
        """What zeros do not say of a model with these units, see ``Plan.stand_ins``."""

    def plan(self, keep: Tensor) -> Plan:
        """The plan with these units kept."""


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
    joined = "+" in plan.structure
    if plan.structure in GROUPED and not (joined and plan.twice):
        return Groups(plan, layout, device, across)
    if plan.structure in SWAPS:
        return SWAPS[plan.structure](plan, layout, device)
    if joined:
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
    assert isinstance(swaps, Limited)
    swaps.close(~earlier.keep)
    return swaps
