"""Products and mean ranks of scores, on weights and on groups, against the same by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from prunekit import ArtifactError, Scores, Trajectory, checkpoint, make_plan, score
from prunekit.criteria import CRITERIA, compose, parse, temper
from prunekit.structure import channel_groups
from tests.conftest import TinyNet, record, tiny_data
from tests.criteria.material import material

Run = tuple[nn.Module, Trajectory]
CHANNELS = torch.arange(3)[:, None]
GROUPS = {
    "conv": {"conv.weight@0": CHANNELS, "conv.bias@0": CHANNELS, "head.weight@1": CHANNELS},
    "head": {"head.weight@0": torch.arange(4)[:, None], "head.bias@0": torch.arange(4)[:, None]},
}


@pytest.fixture
def parts(tiny_run: Run) -> dict[str, Scores]:
    model, trajectory = tiny_run
    batches = [tiny_data(6, torch.float64)]
    names = ("influence", "magnitude", "taylor(target=margin,aggregation=l2)")
    return {name: score(trajectory, model, batches, name) for name in names}


def test_a_product_is_the_product_of_weights_and_of_groups(parts: dict[str, Scores]) -> None:
    found = compose(parse("influence^0.25*magnitude^0.75"), parts)
    influence, magnitude = parts["influence"], parts["magnitude"]
    for name, tensor in found.importance.items():
        torch.testing.assert_close(tensor, influence.importance[name] ** 0.25 * magnitude.importance[name] ** 0.75)
    groups = found.groups(GROUPS)
    for name, members in GROUPS.items():
        expected = influence.group(members) ** 0.25 * magnitude.group(members) ** 0.75
        torch.testing.assert_close(groups[name], expected)
        torch.testing.assert_close(found.group(members), expected)


def test_a_mean_of_ranks_is_over_all_weights_and_over_all_groups(parts: dict[str, Scores]) -> None:
    found = compose(parse("rank(influence)+rank(magnitude*taylor(target=margin,aggregation=l2))"), parts)
    second = {
        n: parts["magnitude"].importance[n] * t for n, t in parts["taylor(target=margin,aggregation=l2)"].importance.items()
    }

    def ranks(tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([t.flatten() for t in tensors])
        return torch.tensor((rankdata(flat.numpy()) - 0.5) / len(flat))

    mean = (ranks(list(parts["influence"].importance.values())) + ranks(list(second.values()))) / 2
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.importance.values()]).double(), mean)
    one = parts["influence"].groups(GROUPS)
    two = {n: parts["magnitude"].group(m) * parts["taylor(target=margin,aggregation=l2)"].group(m) for n, m in GROUPS.items()}
    groups = found.groups(GROUPS)
    mean = (ranks(list(one.values())) + ranks(list(two.values()))) / 2
    torch.testing.assert_close(torch.cat(list(groups.values())), mean)


def test_equal_importances_share_their_rank() -> None:
    facts = {"criterion": "magnitude", "group": "l2", "trajectory": "t", "model": "m", "prunable": ["w"]}
    part = Scores({"w": torch.tensor([[0.0, 0, 3], [3, 0, 9]])}, {}, facts)
    found = compose(parse("rank(magnitude)"), {"magnitude": part})
    torch.testing.assert_close(found.importance["w"], torch.tensor([[1.5, 1.5, 4], [4, 1.5, 5.5]]) / 6)


def test_tempering_joins_powers_and_ends_are_the_parts_themselves(parts: dict[str, Scores]) -> None:
    influence, magnitude = parts["influence"], parts["magnitude"]
    assert temper(influence, magnitude, 0) is magnitude
    assert temper(influence, magnitude, 1) is influence
    found = temper(influence, magnitude, 0.25)
    assert found.digest == compose(parse("influence^0.25*magnitude^0.75"), parts).digest
    twice = temper(compose(parse("influence^0.5*magnitude^0.5"), parts), magnitude, 0.5)
    assert twice.criterion == "influence^0.25*magnitude^0.75"
    assert twice.digest == found.digest
    with pytest.raises(ValueError, match="p is"):
        temper(influence, magnitude, 1.5)
    with pytest.raises(ArtifactError, match="mean of ranks"):
        temper(compose(parse("rank(influence)"), parts), magnitude, 0.5)


def test_zeros_of_a_factor_that_is_not_there_leave_no_trace() -> None:
    facts = {"group": "l2", "trajectory": "t", "model": "m", "prunable": ["w"]}
    zeros = Scores({"w": torch.tensor([[0.0, 0, 1]])}, {}, {"criterion": "gradient", **facts})
    sizes = Scores({"w": torch.tensor([[3.0, 2, 1]])}, {}, {"criterion": "magnitude", **facts})
    assert torch.equal(temper(zeros, sizes, 0).importance["w"], sizes.importance["w"])
    assert temper(zeros, sizes, 0.1).importance["w"].tolist() == [[0, 0, 1]]


def test_products_neither_overflow_nor_vanish() -> None:
    facts = {"criterion": "gradient", "group": "l2", "trajectory": "t", "model": "m", "prunable": ["w"]}
    part = Scores({"w": torch.tensor([[1e-20, 2e-20, 0, 1e20]])}, {}, facts)
    found = compose(parse("gradient^3"), {"gradient": part}).importance["w"]
    assert found.argsort().tolist() == [[2, 0, 1, 3]]
    assert (found == 0).sum() == 1
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    "name",
    [
        "influence^0.25*magnitude^0.75", "rank(influence)+rank(magnitude)", "rank(influence*magnitude)+rank(magnitude)",
        "lamp^2", "rank(lamp)+rank(movement)", "grasp*taylor",
    ],
)  # fmt: skip
def test_composed_files_come_back_whole(tiny_run: Run, tmp_path: Path, name: str) -> None:
    model, trajectory = tiny_run
    found = score(trajectory, model, [tiny_data(6, torch.float64)], name)
    found.save(tmp_path / "a.safetensors")
    back = Scores.load(tmp_path / "a.safetensors")
    assert back.digest == found.digest
    assert back.provenance == found.provenance
    assert back.cost == found.cost
    for group, values in found.groups(GROUPS).items():
        assert torch.equal(back.groups(GROUPS)[group], values)
    assert [part.digest for part in back.parts] == [part["digest"] for part in back.provenance["parts"]]


def test_a_part_that_was_changed_is_noticed(parts: dict[str, Scores], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    compose(parse("influence*magnitude"), parts).save(path)
    tensors = checkpoint.read_tensors(path)
    changed = {**tensors, "part1|conv.weight": tensors["part1|conv.weight"] + 1}
    checkpoint.write_tensors(path, changed, checkpoint.read_header(path))
    with pytest.raises(ArtifactError, match="does not match its digest"):
        Scores.load(path)


def test_parts_of_other_weights_are_refused(parts: dict[str, Scores]) -> None:
    other = replace(parts["magnitude"], provenance={**parts["magnitude"].provenance, "model": "another"})
    with pytest.raises(ArtifactError, match="influence and of magnitude were made from different model"):
        compose(parse("influence*magnitude"), {**parts, "magnitude": other})
    with pytest.raises(ArtifactError, match="different model"):
        temper(parts["influence"], other, 0)


@pytest.mark.slow
def test_options_are_what_they_say(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    batches = [tiny_data(6, torch.float64)]
    pairs = [
        ("influence(target=margin,aggregation=l2)", {"target": "margin", "aggregation": "l2"}),
        ("influence(share=survival,nodes=2)", {"share": "survival", "nodes": 2}),
        ("survival(target=log_prob)", {"share": "survival", "target": "log_prob"}),
        ("lca", {"share": "whole", "target": "loss", "aggregation": "mean"}),
    ]
    for name, options in pairs:
        named, plain = score(trajectory, model, batches, name), score(trajectory, model, batches, **options)  # type: ignore[arg-type]
        assert named.criterion == name
        assert {**named.provenance, "criterion": ""} == {**plain.provenance, "criterion": ""}
        for key, tensor in {**plain.importance, **plain.axis_sums}.items():
            assert torch.equal({**named.importance, **named.axis_sums}[key], tensor)


@pytest.mark.slow
def test_loss_change_allocation_sums_to_the_change_of_the_loss(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(6, torch.float64)
    found = score(trajectory, model, [(x, y)], "lca(nodes=16)")
    total = sum(v.sum(2).mean() for k, v in found.axis_sums.items() if k.endswith("@0"))
    twin = TinyNet().double()
    losses = []
    for index in (0, -1):
        twin.load_state_dict(trajectory.model_state(index))
        losses.append(nn.functional.cross_entropy(twin(x), y))
    torch.testing.assert_close(total, losses[1] - losses[0], atol=1e-4, rtol=1e-3)


def test_a_composed_plan_removes_what_it_should(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = tiny_data(6, torch.float64)
    found = score(trajectory, model, [(x, y)], "rank(influence)+rank(lamp)")
    plan = make_plan(found, model, x[:1], sparsity=0.5, structure="channels")
    (group,) = channel_groups(model, x[:1])
    values = found.groups({group.name: group.members})[group.name]
    kept = plan.keep[group.name]
    assert values[kept].min() >= values[~kept].max()


@pytest.mark.parametrize("name", list(CRITERIA))
def test_gradient_evaluations_are_counted(tiny_run: Run, name: str) -> None:
    model, trajectory, batches, options = material(name, tiny_run, 5)
    found = score(trajectory, model, batches, name, **options).cost["gradient_evaluations"]
    steps = len(trajectory)
    counts = {
        "influence": 5 * 4 * steps, "survival": 5 * 4 * (steps + 1), "lca": 5 * steps, "gradient": 5, "taylor": 5, "fisher": 5,
        "snip": 5, "grasp": 15, "synflow": 1, "wanda": 0, "obs": 0, "kfac": 5, "flap": 0, "reap": 0, "block_influence": 0,
    }  # fmt: skip
    if name in counts or not CRITERIA[name].needs_data:
        assert found == counts.get(name, 0)
    else:
        assert found >= 0  # a criterion that is newer than this list


@pytest.mark.slow
def test_gradient_evaluations_follow_nodes_targets_and_parts(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    batches = [tiny_data(5, torch.float64)]
    composed = score(trajectory, model, batches, "influence(target=margin,nodes=3)*taylor(target=outputs)")
    assert composed.cost["gradient_evaluations"] == 5 * len(trajectory) * 3 + 5 * 4
    halved = score(trajectory, model, batches, tolerance=1e-6)
    assert halved.cost["gradient_evaluations"] > 5 * 4 * len(trajectory)
