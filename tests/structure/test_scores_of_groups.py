"""An additive criterion scores a unit by the sum of its signed scores per sample and target, from axis sums alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from prunekit import Scores
from prunekit.criteria.scores import summed_axes
from prunekit.structure import find_groups
from prunekit.trajectory import Layout
from tests.structure_models import CASES, IMAGES


@pytest.mark.parametrize(("structure", "name", "build"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_score_of_a_unit(structure: str, name: str, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    parameters = Layout.of(model).parameters
    signed = {e.name: torch.randn(3, 2, *e.shape, dtype=torch.float64) for e in parameters}
    axis_sums = {
        f"{e.name}@{axis}": signed[e.name].movedim(axis + 2, 2).flatten(3).sum(-1)
        if len(e.shape) > 1
        else signed[e.name]
        for e in parameters
        for axis in summed_axes(len(e.shape))
    }  # fmt: skip
    importance = {e.name: signed[e.name].abs().sum((0, 1)) for e in parameters if len(e.shape) >= 2}
    facts = {"criterion": "influence", "group": "sum", "aggregation": "l1", "prunable": list(importance)}
    scores = Scores(importance, axis_sums, facts)
    for group in find_groups(structure, model, IMAGES):
        found = scores.group(group.members)
        assert found.shape == (group.size,)
        for unit in range(group.size):
            total = torch.zeros(3, 2, dtype=torch.float64)
            for member, index in group.members.items():
                parameter, axis = member.rsplit("@", 1)
                if parameter in signed:
                    total += signed[parameter].index_select(int(axis) + 2, index[unit]).flatten(2).sum(-1)
            assert float(found[unit]) == pytest.approx(float(total.abs().sum()), rel=1e-9)
