"""Whole channels: removed in order of importance until the asked share of prunable parameters is nearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.criteria.scores import Scores
from prunekit.plan.allocation import Sharing
from prunekit.structure.channels import ChannelGroup


def channel_keeps(
    scores: Scores,
    groups: Sequence[ChannelGroup],
    shapes: dict[str, tuple[int, ...]],
    prunable: Sequence[str],
    sparsity: float,
    allocation: Sharing,
) -> dict[str, Tensor]:
    """Channels to keep by group name, ``(channels,)``.

    Channels go one by one, least important first, the last one of a group never; of the states passed through, the
    one whose removed share of prunable parameters is nearest to ``sparsity`` is taken.
    """
    comparable = allocation(scores.groups({group.name: group.members for group in groups}))
    keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    by_name = {group.name: group for group in groups}
    ranking = sorted(
        ((float(value), g, channel) for g, group in enumerate(groups) for channel, value in enumerate(comparable[group.name])),
    )
    # Kept length of every axis that some group touches: a parameter keeps the product of its axes.
    lengths = {name: list(shapes[name]) for name in prunable}
    total = sum(_product(length) for length in lengths.values())
    best, best_distance, removed_so_far = 0, sparsity, 0
    order: list[tuple[str, int]] = []
    for _, g, channel in ranking:
        name = groups[g].name
        if int(keep[name].sum()) == 1:
            continue
        keep[name][channel] = False
        order.append((name, channel))
        for member, index in by_name[name].members.items():
            parameter, axis = member.rsplit("@", 1)
            if parameter in lengths:
                lengths[parameter][int(axis)] -= index.shape[1]
        removed_so_far = total - sum(_product(length) for length in lengths.values())
        distance = abs(removed_so_far / total - sparsity)
        if distance < best_distance:
            best, best_distance = len(order), distance
        if removed_so_far / total >= sparsity:
            break
    for name, channel in order[best:]:
        keep[name][channel] = True
    return keep


def _product(lengths: list[int]) -> int:
    return int(torch.Size(lengths).numel())
