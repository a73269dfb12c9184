"""Blame for changed answers: complete, shared fairly where groups overlap, and right where one group did it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import Trajectory, make_plan
from prunekit.criteria import score
from prunekit.errors import UsageError
from prunekit.explain import PrunedPath, explain_diff
from prunekit.explain.diff import answer_margin
from prunekit.plan import Plan
from prunekit.trajectory import Segment
from tests.conftest import TinyNet, record, tiny_data


class Deep(nn.Module):
    """Two convolutions, so that a weight can leave with two channels; with BatchNorm, buffers go as well."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 6, 1), nn.Linear(6, 4)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.two(torch.tanh(self.one(x))))).mean((2, 3)))


def pruned(trajectory: Trajectory, plan: Plan) -> PrunedPath:
    masks, last = plan.masks(), trajectory.state(-1)
    keep = torch.cat([masks.get(e.name, torch.ones(e.shape, dtype=torch.bool)).flatten() for e in trajectory.layout])
    end = torch.where(keep, last, torch.zeros_like(last))
    jump = Segment(len(trajectory), last, end, end - last, jump=True)
    return PrunedPath("p", keep, {n: k for n, k in plan.keep.items() if n in plan.groups}, (jump,), end)


def made(folder: Path, structure: str, norm: bool = False) -> tuple[nn.Module, Trajectory, Plan, PrunedPath]:
    torch.manual_seed(0)
    model = Deep(norm).double()
    trajectory = record(folder, model, torch.optim.AdamW(model.parameters(), lr=0.05), steps=20)
    scores = score(trajectory, model.eval(), [], "random", seed=1)
    plan = make_plan(scores, model, tiny_data(2, torch.float64)[0], sparsity=0.5, structure=structure)
    return model, trajectory, plan, pruned(trajectory, plan)


def outputs(model: nn.Module, trajectory: Trajectory, state: Tensor, x: Tensor) -> Tensor:
    views = {k: v.view(trajectory.layout.views(state)[k].shape) for k, v in trajectory.layout.views(state).items()}
    return torch.func.functional_call(model.eval(), views, (x,)).detach()


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "norm"), [("channels", False), ("channels", True), ("unstructured", False)])
def test_blame_is_complete(tmp_path: Path, structure: str, norm: bool) -> None:
    model, trajectory, plan, path = made(tmp_path / "t", structure, norm)
    x, y = tiny_data(60, torch.float64, seed=3)
    found = explain_diff(model, trajectory, path, plan, x, y, limit=100)
    dense, small = (outputs(model, trajectory, s, x) for s in (trajectory.state(-1), path.end))
    changed = (dense.argmax(1) != small.argmax(1)).nonzero()[:, 0].tolist()
    assert len(changed) >= 5
    assert sorted(row["index"] for row in found["changes"]) == changed
    assert found["accuracy"]["dense"] == pytest.approx(float((dense.argmax(1) == y).double().mean()))
    assert found["changed"]["all"] == len(changed)
    assert sum(found["changed"][k] for k in ("right_to_wrong", "wrong_to_right", "wrong_to_wrong")) == len(changed)
    for row in found["changes"]:
        k, a, b = row["index"], row["dense"], row["pruned"]
        assert row["margin_dense"] == pytest.approx(float(dense[k, a] - dense[k, b]), abs=1e-12)
        assert row["margin_dense"] >= 0 >= row["margin_pruned"]
        assert row["pruning"] == pytest.approx(row["margin_dense"] - row["margin_pruned"], abs=1e-12)
        assert abs(row["residual"]) < 0.01 * abs(row["pruning"])
        assert abs(row["rewinding"]) + abs(row["training_since"]) < 1e-12
    mean = sum(row["pruning"] + row["residual"] for row in found["changes"]) / len(changed)
    assert sum(g["blame"] for g in found["groups"]) == pytest.approx(mean, abs=1e-12)
    assert sum(layer["blame"] for layer in found["layers"]) == pytest.approx(mean, abs=1e-12)
    assert sum(g["first_for"] for g in found["groups"]) == len(changed)


def test_blame_of_a_group_against_a_plain_loop(tmp_path: Path) -> None:
    """Every removed channel's integral by autograd, weights that leave with two channels counted half for each."""
    model, trajectory, plan, path = made(tmp_path / "t", "channels")
    x, y = tiny_data(60, torch.float64, seed=3)
    found = explain_diff(model, trajectory, path, plan, x, y, limit=3, nodes=4)
    members: dict[str, Tensor] = {}
    for name in plan.groups:
        for unit in (~plan.keep[name]).nonzero().flatten().tolist():
            mask = {e.name: torch.zeros(e.shape, dtype=torch.float64) for e in trajectory.layout}
            for key, where in plan.index.items():
                if key.startswith(f"{name}|"):
                    parameter, axis = key.split("|")[1].rsplit("@", 1)
                    mask[parameter].movedim(int(axis), 0)[where[unit]] = 1
            members[f"{name} {unit}"] = trajectory.layout.flatten(mask)
    assert set(members) == {g["name"] for g in found["groups"]}
    count = torch.stack(list(members.values())).sum(0)
    assert count.max() == 2
    last = trajectory.state(-1)
    for row in found["changes"]:
        k, pair = row["index"], torch.tensor([[row["dense"], row["pruned"]]])
        slope = torch.zeros_like(last)
        for node in (0.125, 0.375, 0.625, 0.875):
            leaf = torch.lerp(last, path.end, node).requires_grad_()
            out = torch.func.functional_call(model, trajectory.layout.views(leaf), (x[k : k + 1],))
            slope += torch.autograd.grad(answer_margin(out, pair).sum(), leaf)[0] / 4
        blame = {n: float((slope * (last - path.end) * m / count.clamp_min(1)).sum()) for n, m in members.items()}
        for group in row["groups"]:
            assert group["blame"] == pytest.approx(blame[group["name"]], abs=1e-10)
        assert row["groups"][0]["name"] == max(blame, key=lambda n: blame[n])


def test_one_removed_channel_has_all_the_blame(tmp_path: Path) -> None:
    model, trajectory, plan, _ = made(tmp_path / "t", "channels")
    for unit in range(6):
        keep = {name: torch.ones_like(k) for name, k in plan.keep.items()}
        keep["two"][unit] = False
        alone = plan.edited(keep)
        x, y = tiny_data(200, torch.float64, seed=3)
        found = explain_diff(model, trajectory, pruned(trajectory, alone), alone, x, y, limit=20)
        if found["changes"]:
            assert [g["name"] for g in found["groups"]] == [f"two {unit}"]
            for row in found["changes"]:
                assert row["groups"][0]["blame"] == pytest.approx(row["pruning"], abs=0.01 * row["pruning"])
            return
    pytest.fail("no single channel changed an answer")


def test_nothing_changed_and_nothing_to_compare(tmp_path: Path) -> None:
    model, trajectory, plan, _ = made(tmp_path / "t", "channels")
    whole = plan.edited({name: torch.ones_like(keep) for name, keep in plan.keep.items()})
    x, y = tiny_data(10, torch.float64)
    found = explain_diff(model, trajectory, pruned(trajectory, whole), whole, x, y, limit=5)
    assert found["changes"] == []
    assert found["changed"]["all"] == 0
    assert found["groups"] == []
    labels: Any = y.double()
    with pytest.raises(UsageError, match="which are no classes"):
        explain_diff(model, trajectory, pruned(trajectory, plan), plan, x, labels, limit=5)


def test_weights_that_stay_and_move_are_named(tmp_path: Path) -> None:
    """Compensation moves kept weights in the same piece; their blame is told apart."""
    torch.manual_seed(0)
    model = TinyNet().double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.3))
    scores = score(trajectory, model, [], "magnitude")
    plan = make_plan(scores, model, None, sparsity=0.3, structure="unstructured")
    path = pruned(trajectory, plan)
    end = path.end.clone()
    end[trajectory.layout.parameters[-1].span] += torch.tensor([5.0, -5.0, 0.0, 0.0])
    jump = Segment(12, path.jumps[0].start, end, end - path.jumps[0].start, jump=True)
    x, y = tiny_data(20, torch.float64)
    found = explain_diff(model, trajectory, PrunedPath("p", path.keep, {}, (jump,), end), plan, x, y, limit=20)
    names = [g["name"] for g in found["groups"]]
    assert names[0] == "head, kept weights"
    assert all(name == "head, kept weights" or name.endswith("]") for name in names)
    assert found["certificate"]["max_residual"] < 1e-2 * found["certificate"]["mean_change"]
