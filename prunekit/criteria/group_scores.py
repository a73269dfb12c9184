"""How a channel's, head's or layer's importance follows from a score file: a plain dict from name to grouping.

A grouping sees all groups at once, since ranks need them; every other one looks at a group by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.criteria.aggregations import AGGREGATIONS
from prunekit.errors import ArtifactError

if TYPE_CHECKING:
    from prunekit.criteria.scores import Scores

Members = Mapping[str, Tensor]
"""``<param>@<axis>`` -> ``(channels, block)``, the indices on that axis that belong to a channel."""
Grouping = Callable[["Scores", Mapping[str, Members]], dict[str, Tensor]]
"""``group name -> members`` to ``group name -> importances (channels,)``."""


def _each(one: Callable[[Scores, Members], Tensor]) -> Grouping:
    return lambda scores, groups: {name: one(scores, members) for name, members in groups.items()}


def _rows(scores: Scores, members: Members) -> list[Tensor]:
    """Importances of a channel's weights, ``(channels, weights)``, one tensor a member."""
    found = []
    for key, index in members.items():
        name, axis = key.rsplit("@", 1)
        if name in scores.importance:
            found.append(scores.importance[name].movedim(int(axis), 0)[index].flatten(1))
    if not found:
        raise ArtifactError(f"scores of {scores.criterion}: hold none of {', '.join(members)}")
    return found


def _sum(scores: Scores, members: Members) -> Tensor:
    aggregation = AGGREGATIONS[scores.provenance["aggregation"]]
    return aggregation(scores.signed(members))


def _l1(scores: Scores, members: Members) -> Tensor:
    return torch.stack([part.sum(1) for part in _rows(scores, members)]).sum(0)


def _squares(scores: Scores, members: Members) -> Tensor:
    return torch.stack([part.square().sum(1) for part in _rows(scores, members)]).sum(0)


def _shift(scores: Scores, members: Members) -> Tensor:
    return scores.signed(members).double().sum((0, 1)) + float(scores.findings["shift"])


def _product(scores: Scores, groups: Mapping[str, Members]) -> dict[str, Tensor]:
    parts = [part.groups(groups) for part in scores.parts]
    return {name: power_product([part[name] for part in parts], scores.provenance["powers"]) for name in groups}


def _rank(scores: Scores, groups: Mapping[str, Members]) -> dict[str, Tensor]:
    return mean_ranks([part.groups(groups) for part in scores.parts])


def key_of(members: Members) -> str:
    """Where scores of exactly these units lie among a file's tensors: their first member, and a hash of what leaves with each."""
    digest = hashlib.sha256()
    for member in sorted(members):
        digest.update(f"{member}{tuple(members[member].shape)}".encode())
        digest.update(members[member].contiguous().cpu().numpy().tobytes())
    return f"{min(members)}|{digest.hexdigest()[:16]}"


def _units(scores: Scores, groups: Mapping[str, Members]) -> dict[str, Tensor]:
    found = {}
    for name, members in groups.items():
        if (units := scores.axis_sums.get(key_of(members))) is None:
            raise ArtifactError(
                f"scores of {scores.criterion}: hold no units {name or min(members)} of this kind; take another criterion"
            )
        found[name] = units.flatten()
    return found


GROUPINGS: dict[str, Grouping] = {
    "sum": _each(_sum),
    "l1": _each(_l1),
    "l2": _each(lambda scores, members: _squares(scores, members).sqrt()),
    "draw": _each(lambda scores, members: _rows(scores, members)[0][:, 0]),
    "shift": _each(_shift),
    "lamp": _each(lambda scores, members: lamp(_squares(scores.parts[0], members).double())),
    "units": _units,
    "product": _product,
    "rank": _rank,
}
"""``sum``: signed scores summed inside the group per sample and target, then aggregated as single weights are (exact,
cancellation included); ``l1``, ``l2``: norm of the importances; ``draw``: one weight's; ``shift``: signed sum plus a constant
that makes every group's non-negative; ``units``: what the file says of exactly these units; ``lamp``: LAMP of the groups'
squared norms; ``product``, ``rank``: of the parts' group scores."""


def growth(scores: Scores) -> float:
    """By which power of their number a group's score grows with weights of equal importance: 1 where they add up.

    1/2 where their squares do, and what is compared per weight is the square; 0 where a group's score is no sum at all (ranks,
    draws, shares of a layer).
    """
    kind = scores.provenance["group"]
    if kind == "product":
        powers = zip(scores.parts, scores.provenance["powers"], strict=True)
        return float(sum(power * growth(part) for part, power in powers))
    if kind == "l2" or (kind == "sum" and scores.provenance["aggregation"] == "l2"):
        return 0.5
    return 1.0 if kind in ("sum", "l1", "units") else 0.0


def power_product(factors: list[Tensor], powers: list[float]) -> Tensor:
    """``Π_k factor_k^power_k`` in float64; powers are above 0, so a zero in any factor gives 0."""
    total = torch.ones_like(factors[0], dtype=torch.float64)
    for factor, power in zip(factors, powers, strict=True):
        total *= factor.double().pow(power)
    return total


def mean_ranks(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over ``parts`` of ranks among all numbers of a part, in (0, 1), float64; equal numbers share their rank."""
    ranked = [_ranks(torch.cat([values.flatten() for values in part.values()])) for part in parts]
    mean = torch.stack(ranked).mean(0).split([values.numel() for values in parts[0].values()])
    return {name: part.view(values.shape) for (name, values), part in zip(parts[0].items(), mean, strict=True)}


def _ranks(flat: Tensor) -> Tensor:
    _, place, counts = torch.unique(flat, return_inverse=True, return_counts=True)
    middle = counts.cumsum(0).double() - counts.double() / 2
    shares: Tensor = middle[place] / len(flat)
    return shares


def lamp(squares: Tensor) -> Tensor:
    """``θ_i² / Σ_{j not before i} θ_j²`` with θ sorted by size, within one layer (Lee et al. 2021, arXiv 2010.07611).

    Equal weights are told apart by their position, as in the paper; a layer of zeros scores 0.
    """
    flat = squares.flatten()
    order = torch.sort(flat, stable=True).indices
    left = flat[order].flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(flat)
    scores[order] = torch.where(left > 0, flat[order] / left, torch.zeros_like(left))
    return scores.view(squares.shape)
