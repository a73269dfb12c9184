"""What a removal is to blame for: complete by layer, class, unit and sample, and asked for by those who need it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunekit import Plan, Trajectory, make_plan, masked, refine
from prunekit.explain import RemovalEffect, explain_removal, explain_removals
from prunekit.measure import kl
from tests.conftest import record, tiny_data
from tests.explain.test_diff import Deep
from tests.structure_models import random_scores

STRUCTURES = ["unstructured", "channels", "block:2x2", "2:4"]


def made(folder: Path, norm: bool = True) -> tuple[nn.Module, Trajectory, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Deep(norm).double()
    trajectory = record(folder, model, torch.optim.AdamW(model.parameters(), lr=0.05), steps=20)
    return model.eval(), trajectory, *tiny_data(60, torch.float64, seed=3)


def planned(model: nn.Module, structure: str, sparsity: float = 0.6, seed: int = 1) -> Plan:
    share = None if structure == "2:4" else sparsity
    return make_plan(random_scores(model, seed), model, tiny_data(2, torch.float64)[0], sparsity=share, structure=structure)


def kl_of(model: nn.Module, plan: Plan, x: Tensor) -> float:
    with torch.no_grad():
        return kl(masked(model, plan)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_classes_and_units_add_up_to_the_divergence(tmp_path: Path, structure: str) -> None:
    model, trajectory, x, y = made(tmp_path / "t")
    plan = planned(model, structure)
    refined = refine(plan, model, [(x, y)], rounds=6, learn=False)
    damage = RemovalEffect(model, trajectory, x, y)
    found = explain_removal(damage, "p", refined, range(60))
    for mask, told in ((plan, found["before"]), (refined, found["after"])):
        whole = kl_of(model, mask, x)
        assert told["divergence"] == pytest.approx(whole, rel=1e-9)
        assert told["blame"] + told["residual"] == pytest.approx(whole, rel=1e-9)
        assert abs(told["residual"]) < 0.02 * whole
        assert sum(row["blame"] for row in told["layers"]) == pytest.approx(told["blame"], rel=1e-12)
        assert sum(row["blame"] for row in told["classes"]) == pytest.approx(told["blame"], rel=1e-12)
        assert sum(map(sum, told["table"])) == pytest.approx(told["blame"], rel=1e-12)
        assert [sum(row) for row in told["table"]] == pytest.approx([row["blame"] for row in told["classes"]])
        assert sum(row["samples"] for row in told["classes"]) == 60
        for row in told["classes"]:  # what a class's own mean leaves unexplained is small as well
            assert row["divergence"] == pytest.approx(kl_of(model, mask, x[y == row["class"]]), rel=1e-9)
            assert row["blame"] == pytest.approx(row["divergence"] * row["samples"] / 60, abs=0.02 * whole)
    back = sum(int((k & ~plan.keep[n]).sum()) for n, k in refined.keep.items())
    out = sum(int((plan.keep[n] & ~k).sum()) for n, k in refined.keep.items())
    size = 4 if structure == "block:2x2" else 1
    assert found["moved"]["back"] * size >= back > 0
    assert found["moved"]["out"] * size >= out > 0
    assert found["after"]["part"]["blame"] == 0
    assert found["before"]["part"]["blame"] > 0
    assert found["units"]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_units_blame_is_the_mean_of_its_samples(tmp_path: Path, structure: str) -> None:
    model, trajectory, x, y = made(tmp_path / "t")
    plan = planned(model, structure)
    damage = RemovalEffect(model, trajectory, x, y, nodes=8)
    keep = damage.mask(plan)
    removal = damage.of(keep, ~keep)
    torch.testing.assert_close(removal.part, removal.table)
    each = damage.by_sample(keep, torch.ones_like(damage.theta))
    assert float(each.mean()) == pytest.approx(float(removal.values.sum()), rel=1e-9)
    found = explain_removal(damage, "p", plan, range(100, 160))
    assert found["before"] is None
    assert found["refine"] is None
    assert found["units"]
    for unit in found["units"]:
        blames = [row["blame"] for row in unit["samples"]]
        assert blames == sorted(blames, reverse=True)
        assert blames[0] >= unit["blame"] > 0  # the largest is no less than the mean
        assert all(row["label"] == int(y[row["index"] - 100]) for row in unit["samples"])
        with torch.no_grad():
            small = masked(model, plan)(x).argmax(1)
        assert all(row["masked"] == int(small[row["index"] - 100]) for row in unit["samples"])


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_blame_a_unit_for_what_it_is_to_blame_for(
    tmp_path: Path, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that leave with two channels count half for each, for every sample as for their mean."""
    model, trajectory, x, y = made(tmp_path / "t")
    seen: list[Tensor] = []
    by_sample = RemovalEffect.by_sample

    def noted(self: RemovalEffect, keep: Tensor, weights: Tensor) -> Tensor:
        seen.append(by_sample(self, keep, weights))
        return seen[-1]

    monkeypatch.setattr(RemovalEffect, "by_sample", noted)
    units = explain_removal(RemovalEffect(model, trajectory, x, y), "p", planned(model, structure), range(60))["units"]
    assert [float(scores.mean()) for scores in seen] == pytest.approx([unit["blame"] for unit in units], rel=1e-9)


def planted(folder: Path) -> tuple[nn.Module, Trajectory, Tensor, Tensor]:
    """Each class is one input, and one weight carries it: without weight ``[k, k]`` only samples of class ``k`` suffer."""
    model = nn.Linear(6, 6).double()
    with torch.no_grad():
        model.weight.copy_(5 * torch.eye(6) + 0.01 * torch.rand(6, 6))
        model.bias.zero_()
    y = torch.arange(6).repeat(8)
    x = torch.eye(6, dtype=torch.float64)[y] * (1 + torch.rand(48, 1, dtype=torch.float64))
    return model, record(folder, model, torch.optim.SGD(model.parameters(), lr=0.0), steps=2, data=(x, y)), x, y


@pytest.mark.slow
@pytest.mark.parametrize("vital", range(0, 6, 2))
def test_samples_of_the_class_that_needs_a_weight_ask_for_it(tmp_path: Path, vital: int) -> None:
    model, trajectory, x, y = planted(tmp_path / "t")
    keep = torch.ones(6, 6, dtype=torch.bool)
    keep[vital, vital] = keep[1, 2] = keep[3, 5] = False
    plan = make_plan(random_scores(model), model, sparsity=0.0).edited({"weight": keep})
    refined = refine(plan, model, [(x, y)], rounds=1, learn=False, share=0.04)
    assert refined.keep["weight"][vital, vital]
    found = explain_removal(RemovalEffect(model, trajectory, x, y), "p", refined, range(48))
    first = found["units"][0]
    assert first["name"] == f"weight[{vital},{vital}]"
    assert len(first["samples"]) == 6
    for row in first["samples"]:
        assert row["label"] == row["index"] % 6 == vital
        assert (row["dense"], row["masked"] == vital) == (vital, False)
    blamed = {row["class"]: row["blame"] for row in found["before"]["classes"]}
    assert max(blamed, key=lambda c: blamed[c]) == vital
    assert blamed[vital] > 0.99 * found["before"]["blame"]
    assert found["before"]["part"]["blame"] > 0.99 * found["before"]["blame"]


@pytest.mark.slow
def test_plans_of_older_files_are_told_as_they_are(tmp_path: Path) -> None:
    model, trajectory, x, y = made(tmp_path / "t")
    refined = dataclasses.replace(refine(planned(model, "unstructured"), model, [(x, y)], rounds=2, learn=False), given={})
    found = explain_removal(RemovalEffect(model, trajectory, x, y), "p", refined, range(60))
    assert found["before"] is None
    assert found["refine"]["history"]
    assert found["units"]


@pytest.mark.slow
@pytest.mark.parametrize("structures", [("unstructured", "unstructured"), ("channels", "channels"), ("channels", "2:4")])
def test_two_masks_differ_by_what_only_one_removes(tmp_path: Path, structures: tuple[str, str]) -> None:
    model, trajectory, x, y = made(tmp_path / "t")
    plans = [planned(model, structure, 0.5, seed) for seed, structure in enumerate(structures)]
    damage = RemovalEffect(model, trajectory, x, y)
    found = explain_removals(damage, ("a", plans[0]), ("b", plans[1]), range(60))
    gone = [~damage.mask(plan) for plan in plans]
    assert found["both"] == int((gone[0] & gone[1]).sum())
    for told, plan, mine, other in zip(found["masks"], plans, gone, gone[::-1], strict=True):
        assert told["divergence"] == pytest.approx(kl_of(model, plan, x), rel=1e-9)
        alone = mine & ~other
        assert told["alone"] == int(alone.sum())
        values = damage.of(~mine, alone).values
        assert told["part"]["blame"] == pytest.approx(float(values[alone].sum()), rel=1e-9)
        for key in ("layers", "classes"):
            assert sum(row["blame"] for row in told[key]) == pytest.approx(told["blame"])
            assert sum(row["blame"] for row in told["part"][key]) == pytest.approx(told["part"]["blame"])
        assert bool(told["units"]) == (structures[0] == structures[1])


@pytest.mark.slow
def test_labels_need_not_be_classes(tmp_path: Path) -> None:
    model, trajectory, x, y = made(tmp_path / "t")
    found = explain_removal(RemovalEffect(model, trajectory, x, y.double()), "p", planned(model, "unstructured"), range(60))
    assert "classes" not in found["after"]
    assert sum(row["blame"] for row in found["after"]["layers"]) == pytest.approx(found["after"]["blame"])
    assert "masked" not in found["units"][0]["samples"][0]
