"""Layers share the pruning as their papers say, and ratios and floors hold exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import Plan, UsageError, make_plan
from prunekit.plan import ALLOCATIONS, choices
from prunekit.plan.allocation import Request, fill, lamp, mean
from tests.structure_models import HANDLED, IMAGES, random_scores


def layers(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{n}": torch.rand(size, generator=generator).double() * 10**n for n, size in enumerate(sizes)}


def test_lamp_by_its_definition() -> None:
    importance = layers(7, 12)
    for name, found in lamp(importance, Request(0.5)).items():
        values = importance[name].tolist()
        for value, score in zip(values, found.tolist(), strict=True):
            assert score == pytest.approx(value**2 / sum(other**2 for other in values if other >= value))


def test_lamp_keeps_one_weight_of_every_layer_until_the_end() -> None:
    found = lamp(layers(5, 50, 500), Request(0.5))
    assert all(values.max() == 1 for values in found.values())


def test_mean_is_blind_to_a_layers_scale() -> None:
    values, rest = torch.rand(9).double(), torch.ones(3).double()
    small, large = (mean({"a": one, "b": rest}, Request(0.5))["a"] for one in (values, values * 1e6))
    torch.testing.assert_close(small, large)
    assert small.mean() == pytest.approx(1)


def test_erk_densities_follow_the_axes() -> None:
    """Densities in the ratio of (sum of axes / product of axes), the full layers aside."""
    model = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 80), nn.Linear(80, 20)).double()
    plan = make_plan(random_scores(model), model, sparsity=0.9, allocation="erk")
    density = {name: c["kept"] / c["total"] for name, c in plan.counts().items()}
    expected = {"0.weight": 100 / 2400, "1.weight": 140 / 4800, "2.weight": 100 / 1600}
    for name, value in expected.items():
        assert density[name] / density["0.weight"] == pytest.approx(value / expected["0.weight"], rel=0.02)


def test_proportional_gives_to_who_contributed() -> None:
    model = nn.Sequential(nn.Linear(20, 50), nn.Linear(50, 20)).double()
    scores = random_scores(model)
    scores.importance["0.weight"].mul_(3 * scores.importance["1.weight"].mean() / scores.importance["0.weight"].mean())
    density = {
        n: c["kept"] / c["total"] for n, c in make_plan(scores, model, sparsity=0.8, allocation="proportional").counts().items()
    }
    assert density["0.weight"] == pytest.approx(3 * density["1.weight"], rel=0.02)


@settings(max_examples=80, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 10)), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 100), min_size=6, max_size=6),
    density=st.floats(0.01, 1),
)
def test_densities_fill_up(weights: list[float], sizes: list[int], density: float) -> None:
    names = [str(n) for n in range(len(weights))]
    by_name = dict(zip(names, sizes, strict=False))
    found = fill(dict(zip(names, weights, strict=True)), by_name, density)
    assert all(0 <= value <= 1 for value in found.values())
    reachable = sum(size for name, size in by_name.items() if weights[int(name)] > 0) / sum(by_name.values())
    if reachable >= density:
        mean_density = sum(found[n] * by_name[n] for n in names) / sum(by_name.values())
        assert mean_density == pytest.approx(density, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    allocation=st.sampled_from(list(ALLOCATIONS)), floor=st.floats(0, 0.3), sparsity=st.floats(0, 0.65), seed=st.integers(0, 3)
)
def test_a_floor_holds_in_every_layer(allocation: str, floor: float, sparsity: float, seed: int) -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.Linear(30, 30), nn.Linear(30, 4))
    scores = random_scores(model, seed)
    scores.importance["0.weight"].mul_(1e-6)  # would go first
    plan = make_plan(scores, model, sparsity=sparsity, allocation=allocation, floor=floor)
    counts = plan.counts()
    assert all(c["kept"] >= math.ceil(c["total"] * floor) for c in counts.values())
    total = sum(c["total"] for c in counts.values())
    assert total - sum(c["kept"] for c in counts.values()) == round(sparsity * total)


def test_ratios_hold_exactly_and_the_rest_takes_the_rest() -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.Linear(30, 30), nn.Linear(30, 4))
    plan = make_plan(random_scores(model), model, sparsity=0.5, ratios={"0.*": 0.25, "2.weight": 0.0})
    counts = plan.counts()
    assert counts["0.weight"] == {"total": 180, "kept": 135}
    assert counts["2.weight"] == {"total": 120, "kept": 120}
    assert counts["1.weight"]["kept"] == 900 - (600 - 45)
    assert plan.provenance["ratios"] == {"0.*": 0.25, "2.weight": 0.0}


def test_rows_lose_the_same_share_each_along_their_layers_own_axis() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ConvTranspose2d(5, 4, 3), nn.Flatten(), nn.Linear(40, 7))
    scores = random_scores(model)
    plan = make_plan(scores, model, sparsity=0.6, allocation="rows")
    removed = 0
    for name, axis in {"0.weight": 0, "1.weight": 1, "3.weight": 0}.items():
        keep, worth = (tensor[name].movedim(axis, 0).flatten(1) for tensor in (plan.keep, scores.importance))
        removed += int((~keep).sum())
        for stays, row in zip(keep, worth, strict=True):
            assert abs(int((~stays).sum()) - 0.6 * len(row)) <= 1
            assert row[stays].min() >= row[~stays].max()
    assert removed == round(0.6 * sum(value.numel() for value in scores.importance.values()))


def test_a_ratio_of_rows_holds_in_every_row() -> None:
    model = nn.Sequential(nn.Linear(20, 6), nn.Linear(6, 30))
    plan = make_plan(random_scores(model), model, sparsity=0.5, allocation="rows", ratios={"0.weight": 0.25})
    assert (~plan.keep["0.weight"]).sum(1).tolist() == [5] * 6


@pytest.mark.parametrize("structure", ["channels", "block:4x1"])
def test_rows_are_for_single_weights(structure: str) -> None:
    model = HANDLED["multilayer"]()
    with pytest.raises(UsageError, match=f"'rows' compares single weights within an output, and the structure is {structure}"):
        make_plan(random_scores(model), model, IMAGES, sparsity=0.4, structure=structure, allocation="rows")
    assert choices(structure, ["rows", "global"], [0.5]) == [("global", 0.5)]
    with pytest.raises(UsageError, match="rows"):
        choices(structure, ["rows"], [0.5])


def test_ratios_of_channels() -> None:
    model = HANDLED["multilayer"]()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.4, structure="channels", ratios={"one": 0.5})
    assert int((~plan.keep["one"]).sum()) == round(0.5 * len(plan.keep["one"]))


def test_a_floor_of_channels() -> None:
    model = HANDLED["multilayer"]()
    scores = random_scores(model)
    scores.importance["one.weight"].mul_(1e-6)

    def plan(floor: float) -> Plan:
        return make_plan(scores, model, IMAGES, sparsity=0.5, structure="channels", floor=floor)

    assert int(plan(0).keep["one"].sum()) < math.ceil(0.5 * len(plan(0).keep["one"]))
    assert int(plan(0.5).keep["one"].sum()) == math.ceil(0.5 * len(plan(0).keep["one"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 1.0}, "floor is 1.0"),
        ({"ratios": {"0.*": 1.0}}, "ratio of 0.* is 1.0"),
        ({"ratios": {"nine.*": 0.5}}, "matches no layer"),
        ({"ratios": {"*": 0.9}}, "remove more than the sparsity"),
        ({"floor": 0.9}, "keep too much"),
        ({"ratios": {"1.weight": 0.0}}, "keep too much"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.Linear(30, 30), nn.Linear(30, 4))
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        make_plan(random_scores(model), model, sparsity=0.5, **options)  # type: ignore[arg-type]
