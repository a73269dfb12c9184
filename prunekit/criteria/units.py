"""Criteria that score the units of one structure (experts, blocks) and not weights: how their scores lie in a score file.

A unit's score lies where an additive criterion's sums lie (``Scores.axis_sums``): at the places of its first member that may be
pruned, divided among them, and 0 at its other members. The signed sum over a unit, which plans take, is then its score. A
weight's importance is its unit's, 0 outside of all units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunekit.criteria.evidence import CriterionResult, Evidence
from prunekit.criteria.scores import summed_axes
from prunekit.structure import Group, find_groups


def units_of(evidence: Evidence, structure: str) -> Sequence[Group]:
    """The groups of a structure that can be cut, read on the first scoring samples.

    Raises:
        StructureError: the model has none.
    """
    samples = evidence.samples()
    example, _ = samples.rows(0, min(2, len(samples)))
    return find_groups(structure, evidence.model, example, evidence.attention)


def scored_units(evidence: Evidence, groups: Sequence[Group], values: Mapping[str, Tensor]) -> CriterionResult:
    """The scores of units, group name -> ``(units,)``, 0 or more, as a criterion gives them."""
    weights = evidence.weights()
    shapes = {name: weights[name].shape for name in evidence.prunable}
    importance = {name: torch.zeros(shape, dtype=weights[name].dtype) for name, shape in shapes.items()}
    sums = empty_sums(shapes)
    touched: dict[str, int] = {}
    for group in groups:
        found = values[group.name].detach().double().cpu()
        first = True
        for key, index in group.members.items():
            name, _, axis = key.rpartition("@")
            if name not in shapes:
                continue
            rows = importance[name].movedim(int(axis), 0)
            each = found.to(rows.dtype).repeat_interleave(index.shape[1]).view(-1, *[1] * (rows.dim() - 1))
            rows[index.flatten()] = torch.maximum(rows[index.flatten()], each)
            if first:
                sums[key][0, 0, index] += found[:, None] / index.shape[1]
            touched[name] = int((importance[name] == 0).sum())
            first = False
    return CriterionResult(importance, sums, findings={"uncovered": {name: count for name, count in touched.items() if count}})


def empty_sums(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """``<param>@<axis>`` -> zeros ``(1, 1, axis size)``, for every axis that a group may ask for."""
    return {
        f"{name}@{axis}": torch.zeros(1, 1, shape[axis], dtype=torch.float64)
        for name, shape in shapes.items()
        for axis in summed_axes(len(shape))
    }
