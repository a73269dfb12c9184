"""Explanations add up: a part is the sum of its weights, of its steps, and of training samples plus regularisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Recorder, Trajectory
from prunekit.criteria import score
from prunekit.errors import PrunekitError, UsageError
from prunekit.explain import PrunedPath, Training, View, explain_part, explain_sample, explain_training_sample, find_part
from prunekit.explain.part import Part
from prunekit.explain.path import trace
from prunekit.explain.timeline import timeline
from prunekit.kernel import attribute, data_scores, layer_step_scores, layers_of, step_scores
from prunekit.models import digits_transformer
from prunekit.structure import channel_groups
from prunekit.trajectory import Segment
from tests.conftest import TinyNet, tiny_data

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.8, weight_decay=0.05),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.05),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.2),
}
DATA = tiny_data(24, torch.float64)
TRAINING = Training(lambda k: (DATA[0][k], DATA[1][k]), F.cross_entropy)


def recorded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any = DATA, steps: int = 10) -> Trajectory:
    x, y = data
    with Recorder(folder, model, optimizer, second_moments=True) as recorder:
        for step in range(steps):
            indices = torch.arange(step * 7, step * 7 + 8) % len(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            recorder.batch(indices)
            optimizer.step()
    return Trajectory(folder)


def viewed(folder: Path, optimizer: str = "adamw", nodes: int = 1) -> tuple[nn.Module, View]:
    torch.manual_seed(0)
    model = TinyNet().double()
    trajectory = recorded(folder, model, OPTIMIZERS[optimizer](model))
    return model, View.of(model, trajectory, *tiny_data(7, torch.float64, seed=11), nodes=nodes)


def channel(model: nn.Module, view: View, unit: int = 1) -> Part:
    return find_part("channel", "conv", str(unit), view.trajectory.layout, model, lambda: view.x[:2])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_is_the_sum_of_its_weights(tmp_path: Path, optimizer: str) -> None:
    model, view = viewed(tmp_path / "t", optimizer)
    part = channel(model, view)
    assert part.counts(view.trajectory.layout) == {"conv.weight": 9, "conv.bias": 1, "head.weight": 4}
    whole = trace(view, part.mask)
    alone = [trace(view, torch.zeros_like(part.mask).index_fill(0, i, True)) for i in part.mask.nonzero()]
    for share in ("kernel", "regularisation"):
        by_weight = sum(getattr(one, share) for one in alone)
        torch.testing.assert_close(getattr(whole, share), by_weight, atol=1e-12, rtol=1e-9)
        scores = next(iter(attribute(view.function, view.segments, view.x, view.y, share=share))).scores
        flat = torch.cat([t.flatten(2) for t in scores.values()], 2)
        torch.testing.assert_close(getattr(whole, share), flat[..., part.mask].sum(2), atol=1e-12, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_is_the_sum_over_training_samples_and_regularisation(tmp_path: Path, optimizer: str) -> None:
    model, view = viewed(tmp_path / "t", optimizer, nodes=2)
    part = channel(model, view)
    found = explain_part(view, part, TRAINING)
    got = found["contribution"]
    assert abs(got["kernel"]) > 1e-4
    assert found["training"]["sum"] + found["training"]["momentum"] == pytest.approx(got["kernel"], abs=1e-12)
    by_data = data_scores(view.function, view.trajectory, view.x, view.y, TRAINING.batch, nodes=2, only=part.mask)
    expected = torch.einsum("ksc,sc->k", by_data.scores, view.own)
    for side, order in (("raised", expected.argsort(descending=True)), ("lowered", expected.argsort())):
        rows = found["training"][side]
        assert [row["index"] for row in rows] == order.tolist()[: len(rows)]
        assert [row["label"] for row in rows] == DATA[1][order[: len(rows)]].tolist()
        assert [row["score"] for row in rows] == pytest.approx(expected[order[: len(rows)]].tolist(), abs=1e-12)
        assert len(rows) == min(12, int((expected > 0).sum() if side == "raised" else (expected < 0).sum()))
    rest = float((by_data.regularisation * view.own).sum())
    assert rest == pytest.approx(got["regularisation"], abs=1e-12)
    assert sum(found["steps"]["kernel"]) == pytest.approx(got["kernel"], abs=1e-12)
    for share in ("kernel", "regularisation"):
        assert sum(p[share] for p in found["steps"]["phases"]) == pytest.approx(got[share], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_samples_through_layers_add_up(tmp_path: Path, optimizer: str) -> None:
    """Sample by sample, not only in sum: masks that part the coordinates part every training sample's score."""
    _, view = viewed(tmp_path / "t", optimizer)
    layout = view.trajectory.layout

    def scores(**options: Any) -> Any:
        return data_scores(view.function, view.trajectory, view.x, view.y, TRAINING.batch, **options)

    whole = scores(watch=[3, 5])
    parts = [scores(only=find_part("layer", name, "", layout, nn.Identity(), Tensor).mask).scores for name in ("conv", "head")]
    torch.testing.assert_close(parts[0] + parts[1], whole.scores, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(whole.by_step.sum(0), whole.scores[[3, 5]], atol=1e-12, rtol=1e-9)
    seen = [s for s in range(len(view.trajectory)) if 3 not in view.trajectory.step(s).batches[0]]
    assert not whole.by_step[seen, 0].any()
    weights = torch.stack([view.own, torch.zeros_like(view.own).index_fill(0, torch.tensor([2]), 0.5)])
    summed = scores(aggregate=weights)
    expected = torch.einsum("ksc,qsc->kq", whole.scores, weights)
    torch.testing.assert_close(summed.scores[:, 0], expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(summed.rebuilt[0], (whole.rebuilt * weights).sum((1, 2)), atol=1e-12, rtol=1e-9)


def test_layers_in_one_backward_pass_are_directional_derivatives(tmp_path: Path) -> None:
    _, view = viewed(tmp_path / "t")
    layout = view.trajectory.layout
    found = layer_step_scores(view.function, view.segments(), view.x, view.y, view.own, nodes=2)
    for k, name in enumerate(layers_of(layout)):
        mask = find_part("layer", name, "", layout, nn.Identity(), Tensor).mask
        for row, share in enumerate(("kernel", "regularisation")):
            by_step = step_scores(view.function, view.segments(), view.x, view.y, share=share, only=mask, nodes=2)
            torch.testing.assert_close(found[row, :, k], (by_step * view.own).sum((1, 2)), atol=1e-13, rtol=1e-9)


@pytest.mark.slow
def test_a_sample_is_rebuilt_and_its_certificate_is_the_error(tmp_path: Path) -> None:
    model, view = viewed(tmp_path / "t", nodes=8)
    one = View.of(model, view.trajectory, view.x[:1], view.y[:1], nodes=8)
    found = explain_sample(one, 0, "test", TRAINING)
    out = model(view.x[:1])[0].detach()
    assert found["answer"] == int(out.argmax())
    for row in found["classes"]:
        assert row["model"] == pytest.approx(float(out[row["class"]] - out.mean()), abs=1e-12)
        rebuilt = row["start"] + row["kernel"] + row["regularisation"]
        assert abs(rebuilt - row["model"]) <= found["certificate"]["max_error"] + 1e-12
    got = found["contribution"]
    layers = sum(p["kernel"] + p["regularisation"] for row in found["layers"]["rows"] for p in row["phases"])
    assert layers == pytest.approx(got["both"], abs=1e-12)
    assert found["training"]["sum"] == pytest.approx(got["kernel"], abs=1e-12)
    assert 0 < found["certificate"]["max_error"] < 0.01


def test_without_second_moments_training_samples_are_left_out_with_a_reason(tiny_run: tuple[nn.Module, Trajectory]) -> None:
    model, trajectory = tiny_run
    view = View.of(model, trajectory, *tiny_data(4, torch.float64, seed=11))
    found = explain_part(view, channel(model, view), TRAINING)
    assert set(found["training"]) == {"note"}
    assert "second_moments=True" in found["training"]["note"]
    assert "no training data" in explain_part(view, channel(model, view))["training"]["note"]
    with pytest.raises(PrunekitError, match="second moments were not recorded"):
        explain_training_sample(view, 0, TRAINING)


def test_pruning_through_a_part(tmp_path: Path) -> None:
    """A removed channel's own part of a pruning is the whole of it when nothing else goes, and 0 elsewhere."""
    model, view = viewed(tmp_path / "t")
    part = channel(model, view)
    last = view.trajectory.state(-1)
    end = torch.where(part.mask, torch.zeros_like(last), last)
    units = {"conv": torch.tensor([True, False, True])}
    path = PrunedPath("p", ~part.mask, units, (Segment(10, last, end, end - last, jump=True),), end)
    found = explain_part(view, part, pruned=[path])["pruning"][0]
    dense, pruned = view.values(last), view.values(end)
    assert found["whole_change"] == pytest.approx(float(((pruned - dense) * view.own).sum()), abs=1e-12)
    assert found["change"] == pytest.approx(found["whole_change"], abs=1e-3 * abs(found["whole_change"]))
    assert (found["removed"], found["of"], found["stays"]) == (14, 14, False)
    other = explain_part(view, channel(model, view, 2), pruned=[path])["pruning"][0]
    assert (other["change"], other["removed"], other["stays"]) == (0, 0, True)


# -- planted cases -----------------------------------------------------------------------------------------------------

CLASSES, ONLY_CLASS, UNIT = 4, 2, 3


def planted_data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Class 2 is told by the last feature alone, which is 0 for every other class, as theirs are for it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % CLASSES
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64) + 2 * F.one_hot(y, 6)
    mine = y == ONLY_CLASS
    x[:, -1] = 0
    x[mine] = 0
    x[mine, -1] = 1 + torch.rand(int(mine.sum()), generator=generator, dtype=torch.float64)
    return x, y


@pytest.fixture
def planted(tmp_path: Path) -> tuple[nn.Module, Trajectory]:
    """A net in which hidden unit 3 fires for class 2 and for nothing else, ever: no gradient can change that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    with torch.no_grad():
        model[0].weight[:, -1] = 0
        model[0].weight[UNIT] = torch.tensor([0, 0, 0, 0, 0, 1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return model, recorded(tmp_path / "t", model, optimizer, planted_data(64, 1), steps=40)


@pytest.mark.slow
def test_a_channel_that_only_one_class_uses(planted: tuple[nn.Module, Trajectory]) -> None:
    model, trajectory = planted
    view = View.of(model, trajectory, *planted_data(32, 2))
    x, y = planted_data(64, 1)
    part = find_part("channel", "0", str(UNIT), trajectory.layout, model, lambda: view.x[:2])
    found = explain_part(view, part, Training(lambda k: (x[k], y[k]), F.cross_entropy))
    first, *rest = found["classes"]
    assert first["class"] == ONLY_CLASS
    assert first["own"] > 0.5
    assert all(row["mean_size"] == 0 for row in rest)
    assert {y[row["index"]].item() for row in found["training"]["raised"][:3]} == {ONLY_CLASS}
    others = find_part("channel", "0", "1", trajectory.layout, model, lambda: view.x[:2])
    assert explain_part(view, others)["classes"][0]["class"] != ONLY_CLASS


@pytest.mark.parametrize("criterion", ["influence(aggregation=l2)", "taylor(aggregation=l2)"])
def test_scores_from_one_class_know_whom_a_channel_serves(planted: tuple[nn.Module, Trajectory], criterion: str) -> None:
    model, trajectory = planted
    x, y = planted_data(32, 3)
    group = next(g for g in channel_groups(model, x[:2]) if g.name == "0")
    for wanted in (ONLY_CLASS, 0):
        mine = y == wanted
        scores = score(trajectory, model, [(x[mine], y[mine])], criterion)
        rank = scores.groups({"0": group.members})["0"].argsort().tolist().index(UNIT)
        assert rank >= 5 if wanted == ONLY_CLASS else rank == 0  # of 8: among the top 3, or the first to go


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_training_sample_repeated_under_a_wrong_label(tmp_path: Path, optimizer: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(48) % 3
    x = torch.randn(48, 6, generator=generator, dtype=torch.float64) + 2 * F.one_hot(y, 6)
    x, y = torch.cat([x, x[:1]]), torch.cat([y, torch.tensor([1])])  # sample 48 is sample 0, of class 0, called class 1
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    opt = OPTIMIZERS[optimizer](model)
    with Recorder(tmp_path / "t", model, opt, second_moments=True) as recorder:
        for step in range(30):
            indices = torch.cat([torch.arange(step * 8, step * 8 + 8) % 48, torch.tensor([48])])
            opt.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            recorder.batch(indices)
            opt.step()
    trajectory = Trajectory(tmp_path / "t")
    training = Training(lambda k: (x[k], y[k]), F.cross_entropy)
    view = View.of(model, trajectory, x[:1] + 0.05, torch.tensor([0]))
    layer = find_part("layer", "2", "", trajectory.layout, model, Tensor)
    for found in (explain_part(view, layer, training), explain_sample(view, 0, "test", training)):
        side = "lowered" if found.get("answer", 0) == 0 else "raised"
        assert 48 in [row["index"] for row in found["training"][side][:3]]
    test = torch.randn(30, 6, generator=generator, dtype=torch.float64) + 2 * F.one_hot(torch.arange(30) % 3, 6)
    given = explain_training_sample(View.of(model, trajectory, test, torch.arange(30) % 3), 48, training)
    assert given["contribution"]["rank"] <= 3
    assert {row["class"]: row["own"] for row in given["classes"]}[0] < 0
    assert given["steps"]["seen"] == list(range(30))


# -- views, names ------------------------------------------------------------------------------------------------------


def test_outputs_that_are_no_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "t", model, optimizer) as recorder:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            recorder.batch(range(12))
            optimizer.step()
    view = View.of(model, Trajectory(tmp_path / "t"), x, y, nodes=4)
    layer = find_part("layer", "0", "", view.trajectory.layout, model, Tensor)
    found = explain_part(view, layer, Training(lambda k: (x[k], y[k]), F.mse_loss))
    assert {row["class"] for row in found["classes"]} == {0, 1}
    assert found["training"]["sum"] == pytest.approx(found["contribution"]["kernel"], abs=1e-12)
    assert sum(row["own"] for row in found["classes"]) == pytest.approx(found["contribution"]["both"], abs=1e-12)


def test_the_timeline_adds_up(tmp_path: Path) -> None:
    _, view = viewed(tmp_path / "t", nodes=8)
    found = timeline(view)
    first, last = (view.values(view.trajectory.state(i)) for i in (0, -1))
    assert found.layers["change"] == pytest.approx(float(((last - first) * view.own).sum()), abs=1e-12)
    assert abs(found.layers["residual"]) < 1e-3 * abs(found.layers["change"])
    assert found.samples is not None
    rows = found.samples["rows"]
    assert [row["label"] for row in rows] == sorted(view.y.tolist())
    assert found.samples["edges"] == list(range(11))
    answers = torch.stack([view.values(view.trajectory.state(s)).argmax(1) for s in range(11)])
    for row in rows:
        k, label = row["sample"], row["label"]
        assert sum(row["moved"]) == pytest.approx(float(last[k, label] - first[k, label]), abs=1e-12)
        right = (answers[1:, k] == label).tolist()
        learned = None
        for step in reversed(range(10)):
            if not right[step]:
                break
            learned = step
        assert row["learned"] == learned


def test_a_head_takes_its_rows_and_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = digits_transformer(width=8, layers=1, heads=4, hidden=8)
    x = torch.randn(8, 1, 8, 8)
    trajectory = recorded(tmp_path / "t", model, torch.optim.AdamW(model.parameters()), (x, torch.arange(8)), steps=2)
    part = find_part("head", "layers.0.attention", "3", trajectory.layout, model, lambda: x[:2])
    name = "layers.0.attention."
    assert part.counts(trajectory.layout) == {
        **{f"{name}{p}_proj.weight": 2 * 8 for p in "qkvo"}, **{f"{name}{p}_proj.bias": 2 for p in "qkv"},
    }  # fmt: skip
    views = trajectory.layout.views(part.mask)
    assert views[f"{name}q_proj.weight"][6:].all()
    assert views[f"{name}o_proj.weight"][:, 6:].all()
    assert part.title == "head 3 of layers.0.attention"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("weight", "conv.weigth", "0,0,0,0"), "did you mean conv.weight"),
        (("weight", "conv.weight", "0,0,0"), "one number an axis, at most 2,0,2,2"),
        (("weight", "conv.weight", "3,0,0,0"), "conv.weight at 3,0,0,0 does not exist"),
        (("weight", "conv.weight", "-1,0,0,0"), "does not exist"),
        (("weight", "conv.weight", "a"), "does not exist"),
        (("channel", "cnov", "0"), "did you mean conv"),
        (("channel", "conv", "3"), "it has 3, numbered 0 to 2"),
        (("channel", "conv", ""), "numbered 0 to 2"),
        (("layer", "haed", ""), "did you mean head"),
        (("layer", "head", "2"), "leave '2' out"),
    ],
)
def test_what_does_not_exist_is_refused(tiny_run: tuple[nn.Module, Trajectory], asked: Any, message: str) -> None:
    model, trajectory = tiny_run
    with pytest.raises(UsageError, match=message):
        find_part(*asked, trajectory.layout, model, lambda: tiny_data(2, torch.float64)[0])
