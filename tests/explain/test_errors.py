"""Errors and rankings against plain autograd in float64: margins, parts that add up, sums over chosen samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data import Samples
from prunekit.errors import UsageError
from prunekit.explain import View, ask, explain_ranking, explain_sample, find_errors
from prunekit.structure import find_groups
from prunekit.task import get_task
from tests.conftest import tiny_data
from tests.explain.test_explain import TRAINING, viewed


def by_autograd(model: nn.Module, view: View, plus: Tensor, minus: Tensor) -> dict[str, Tensor]:
    """What every weight gave to ``Σ (f[plus] - f[minus])``: one midpoint a step, by plain autograd."""
    path, total = view.trajectory, torch.zeros(view.trajectory.layout.total, dtype=torch.float64)
    rows = torch.arange(len(view.x))
    for s in range(len(path)):
        middle, step = (path.state(s) + path.state(s + 1)) / 2, path.state(s + 1) - path.state(s)
        leaves = {name: t.clone().requires_grad_(True) for name, t in path.layout.views(middle).items()}
        out = torch.func.functional_call(model, leaves, (view.x,))
        found = torch.autograd.grad((out[rows, plus] - out[rows, minus]).sum(), list(leaves.values()))
        total += torch.cat([g.flatten() for g in found]) * step
    return path.layout.views(total)


def errors_of(model: nn.Module, view: View) -> Tensor:
    return (model(view.x).argmax(1) != view.y).nonzero()[:, 0]


def test_errors_are_the_misclassified_samples_by_margin(tmp_path: Path) -> None:
    model, view = viewed(tmp_path / "t")
    x, y = tiny_data(40, torch.float64, seed=3)
    found = find_errors(
        view.function, view.trajectory.state(-1), Samples(lambda k: (x[list(k)], y[list(k)]), [range(25), range(25, 40)])
    )
    out = model(x).detach()
    margins = out.amax(1) - out[torch.arange(40), y]
    wrong = [k for k in margins.argsort(descending=True).tolist() if margins[k] > 0]
    assert found.indices == wrong
    assert [row["margin"] for row in found.rows] == pytest.approx([float(margins[k]) for k in wrong], abs=1e-12)
    assert (found.samples, found.wrong, found.mean) == (40, len(wrong), None)


@pytest.mark.slow
def test_a_wrong_answer_is_answered_minus_right_and_its_parts_are_plain_autograd(tmp_path: Path) -> None:
    model, view = viewed(tmp_path / "t")
    k = int(errors_of(model, view)[0])
    one = View.of(model, view.trajectory, view.x[k : k + 1], view.y[k : k + 1])
    out = model(one.x).detach()
    answered, right = out.argmax(1), one.y
    units = {"channel": find_groups("channels", model, view.x[:2])}
    found = explain_sample(one, k, "test", TRAINING, units=units)
    assert found["asked"] == "error"
    assert f"class {int(answered)} (answered) less that of class {int(right)} (right)" in found["quantity"]
    assert found["contribution"]["model"] == pytest.approx(float(out[0, answered] - out[0, right]), abs=1e-12)
    expected = by_autograd(model, one, answered, right)
    layers = {row["name"]: row["both"] for row in found["ranked"]["layer"]["rows"]}
    for name in ("conv", "head"):
        assert layers[name] == pytest.approx(float(expected[f"{name}.weight"].sum() + expected[f"{name}.bias"].sum()), abs=1e-12)
    for row in found["ranked"]["channel"]["rows"]:
        unit = int(row["name"].split()[1])
        inside = expected["conv.weight"][unit].sum() + expected["conv.bias"][unit]
        assert row["inside"] == pytest.approx(float(inside), abs=1e-12)
        assert row["both"] == pytest.approx(float(inside + expected["head.weight"][:, unit].sum()), abs=1e-12)
    sums = found["completeness"]
    assert sums["layers"] == pytest.approx(sum(layers.values()), abs=1e-12)
    assert sums["start"] + sums["layers"] + sums["residual"] == pytest.approx(sums["model"], abs=1e-12)
    assert abs(sums["residual"]) < 0.05
    for row in (*found["training"]["raised"], *found["training"]["lowered"]):
        assert sum(row["phases"]) == pytest.approx(row["score"], abs=1e-12)


def test_rankings_of_chosen_samples_are_sums_over_them(tmp_path: Path) -> None:
    model, view = viewed(tmp_path / "t")
    wrong = errors_of(model, view)
    some = View.of(model, view.trajectory, view.x[wrong], view.y[wrong])
    expected = by_autograd(model, some, model(some.x).argmax(1), some.y)
    units = {"channel": find_groups("channels", model, view.x[:2])}
    weights = explain_ranking(ask(some), "weight", "conv.weight", {}, 100)
    assert weights["asked"] == "error"
    for row in weights["rows"]:
        index = tuple(int(i) for i in row["name"].split()[1].split(","))
        assert row["both"] == pytest.approx(float(expected["conv.weight"][index]), abs=1e-12)
    sizes = [abs(row["both"]) for row in weights["rows"]]
    assert (len(sizes), sizes) == (27, sorted(sizes, reverse=True))
    channels = explain_ranking(ask(some), "channel", "conv", units)
    conv = {row["name"]: row["both"] for row in explain_ranking(ask(some), "layer", "", {})["rows"]}["conv"]
    assert channels["within"]["whole"] == pytest.approx(conv, abs=1e-12)
    assert sum(row["inside"] for row in channels["rows"]) + channels["within"]["left"] == pytest.approx(conv, abs=1e-12)


def test_a_loss_is_compared_with_the_mean_of_others(tmp_path: Path) -> None:
    model, view = viewed(tmp_path / "t")
    asked = ask(view, "loss", 1)
    losses = F.cross_entropy(model(view.x), view.y, reduction="none").detach()
    value = float((asked.own * asked.values(view.trajectory.state(-1))).sum())
    assert value == pytest.approx(float(losses[0] - losses[1:].mean()), abs=1e-12)


def test_targets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    model, view = viewed(tmp_path / "t")
    right = (model(view.x).argmax(1) == view.y).nonzero()[0]
    for target, message in (
        ("eror", "did you mean error"),
        ("9", "0 to 3"),
        ("2-2", "two different"),
        ("error", "answered right"),
    ):
        with pytest.raises(UsageError, match=message):
            ask(View.of(model, view.trajectory, view.x[right], view.y[right]), target)
    numbers = View.of(model, view.trajectory, view.x, None, task=get_task("unlabelled"))
    with pytest.raises(UsageError, match="neither classes nor a loss"):
        find_errors(numbers.function, view.trajectory.state(-1), Samples(lambda k: (view.x[list(k)], None), [range(4)]))
