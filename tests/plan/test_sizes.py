"""Multiples and least numbers of units, targets that are missed, ignored layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from prunekit import make_plan
from prunekit.errors import UsageError
from prunekit.plan import MissedTarget
from prunekit.structure import prunable_parameters
from prunekit.trajectory import Layout
from tests.structure_models import ATTENTIVE, IMAGES, random_scores


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 64, 3, padding=1),
        nn.GroupNorm(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_what_stays_is_a_multiple_or_all(sparsity: float) -> None:
    model = wide()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=sparsity, structure="channels", round_to=8, min_units=12)
    for name, keep in plan.keep.items():
        each = next(index.shape[1] for key, index in plan.index.items() if key.startswith(f"{name}|"))
        left = int(keep.sum())
        assert left * each % 8 == 0 or keep.all()
        assert left >= 12
    assert plan.provenance["round_to"] == 8


def test_multiples_of_one_are_the_plan_without_them() -> None:
    model = wide()
    scores = random_scores(model, levels=4)
    plain, rounded = (
        make_plan(scores, model, IMAGES, sparsity=0.5, structure="channels", **options)
        for options in ({}, {"round_to": 1, "min_units": 1})
    )
    assert plain.digest == rounded.digest


def test_heads_are_counted_in_heads() -> None:
    model = ATTENTIVE["separate"]()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.3, structure="heads", round_to=2)
    assert [int(keep.sum()) for keep in plan.keep.values()] == [2]


@pytest.mark.parametrize(("structure", "options"), [("unstructured", {"round_to": 8}), ("channels", {"min_units": 0})])
def test_sizes_that_make_no_sense(structure: str, options: dict[str, int]) -> None:
    model = wide()
    with pytest.raises(UsageError, match=next(iter(options))):
        make_plan(random_scores(model), model, IMAGES, sparsity=0.3, structure=structure, **options)


def test_a_missed_target_is_said() -> None:
    model = wide()
    with pytest.warns(MissedTarget, match=r"asked for 50\.0 % .* removes"):
        plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels", min_units=30)
    assert plan.missed
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissedTarget)
        assert make_plan(random_scores(model), model, IMAGES, sparsity=0.5).missed is None


def test_an_ignored_layer_loses_nothing() -> None:
    model = wide()
    scores = random_scores(model)
    scores.provenance["kept"] = ["2"]
    plan = make_plan(scores, model, IMAGES, sparsity=0.1, structure="channels")
    assert {"0", "2"} <= plan.provenance["refused"].keys()
    assert all(mask.all() for name, mask in plan.masks().items() if name.startswith("2."))


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.wpe, self.tokens = nn.Parameter(torch.zeros(4, 8)), nn.Embedding(4, 8), nn.Embedding(9, 8)
        self.norm, self.head, self.rnn = nn.LayerNorm((4, 8)), nn.Linear(8, 3), nn.GRU(3, 2)


def test_weights_are_those_of_layers() -> None:
    model = Positioned()
    layout = Layout.of(model)
    rnn = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert prunable_parameters(model, layout) == ["tokens.weight", "head.weight", *rnn]
    assert prunable_parameters(model, layout, ["tokens.*"], ["tab*"]) == ["table", "head.weight", *rnn]
    with pytest.raises(UsageError, match=r"prunable\.include: 'tables' matches no parameter"):
        prunable_parameters(model, layout, (), ["tables"])
    with pytest.raises(UsageError, match="fewer than two axes"):
        prunable_parameters(model, layout, (), ["head.bias"])


def test_a_tied_weight_goes_by_all_of_its_names() -> None:
    model = Positioned()
    model.head = nn.Linear(8, 9, bias=False)
    model.head.weight = model.tokens.weight
    layout = Layout.of(model)
    rnn = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert prunable_parameters(model, layout) == ["tokens.weight", *rnn]
    for pattern in ("tokens.*", "head.*", "*head*"):
        assert prunable_parameters(model, layout, [pattern, "*head*"]) == rnn
