"""Compensated weights: judged on samples of their own, closer to the dense model's outputs, zeros in place."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import ArtifactError, UsageError, make_plan, score
from prunekit.apply import compensate, layerwise, load, prune, save
from prunekit.apply.gauss_newton import Distance, Part, _solved, descend
from prunekit.data import Samples
from prunekit.kernel import ModelFunction
from prunekit.task import Classification, Regression
from prunekit.trajectory import Layout
from tests.conftest import record, tiny_data


class Sequences(nn.Module):
    """``(samples, 1, 4, 4) -> (samples, 4, 3)``: scores of three classes at four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.norm(self.inner(x.squeeze(1)))))
        return found


def vectors() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 4))


def by_hand(outputs: Tensor, wanted: Tensor, classes: bool) -> Tensor:
    """The mean distance, from its definition."""
    if not classes:
        return (outputs - wanted).square().mean()
    p, q = wanted.softmax(-1), outputs.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def posed(build: Callable[[], nn.Module], classes: bool) -> tuple[Distance, Tensor, tuple[Part, ...], Callable[..., Any]]:
    """A distance, weights away from where it is 0, samples beside the first model's outputs (all, and the parts), and the model

    as a function."""
    torch.manual_seed(0)
    model = build().double()
    layout = Layout.of(model)
    x = tiny_data(11, torch.float64)[0]
    task = Classification() if classes else Regression()
    rows = ModelFunction(model, layout, target=lambda out, _: out.reshape(len(out), -1), task=task)
    distance = Distance(rows, task, copy.deepcopy(model))
    batches = [distance.referenced(Samples.held([(part, None)])) for part in x.split(6)]
    theta = layout.flatten(dict(model.named_parameters()))
    theta = theta + 0.3 * torch.randn(theta.shape, dtype=theta.dtype)

    def outputs(flat: Tensor) -> Tensor:
        return torch.func.functional_call(model, layout.views(flat), (x,))

    return distance, theta, (distance.referenced(Samples.held([(part, None) for part in x.split(6)])), *batches), outputs


CASES = [(vectors, True), (vectors, False), (Sequences, True), (Sequences, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "classes"), CASES)
def test_value_gradient_and_curvature_are_those_of_the_definition(build: Callable[[], nn.Module], classes: bool) -> None:
    distance, theta, (batches, *_), outputs = posed(build, classes)
    wanted = torch.cat([distance.dense(x) for x, _ in batches.batches.source]).detach()
    assert distance.value(theta, batches) == pytest.approx(float(by_hand(outputs(theta), wanted, classes)), rel=1e-10)
    gradient = torch.autograd.functional.jacobian(lambda t: by_hand(outputs(t), wanted, classes), theta)
    torch.testing.assert_close(distance.gradient(theta, batches), gradient)
    jacobian = torch.autograd.functional.jacobian(outputs, theta).flatten(0, -2)
    here = outputs(theta).detach()
    inner = torch.autograd.functional.hessian(lambda o: by_hand(o, wanted, classes), here).reshape(here.numel(), -1)
    exact = jacobian.T @ inner @ jacobian
    direction = torch.randn(theta.shape, dtype=theta.dtype)
    torch.testing.assert_close(distance.product(theta, direction, batches), exact @ direction)
    engine = distance.engine(theta, batches)
    draws = torch.stack([distance.diagonal(theta, batches, engine, seed) for seed in range(400)])
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - exact.diagonal()).abs() <= 5 * error + 1e-12).all()


@pytest.mark.slow
@pytest.mark.parametrize(("build", "classes"), CASES)
def test_the_step_solves_what_is_free_and_leaves_the_rest(build: Callable[[], nn.Module], classes: bool) -> None:
    distance, theta, (batches, *_), _ = posed(build, classes)
    free = (torch.rand(theta.shape, generator=torch.Generator().manual_seed(2)) < 0.4).to(theta)
    gradient = distance.gradient(theta, batches) * free
    some = free.nonzero()[:, 0]
    matrix = torch.stack([distance.product(theta, unit, batches)[some] for unit in torch.eye(len(theta)).double()[some]])
    exact = torch.linalg.solve(matrix + 0.05 * torch.eye(len(some)).double(), -gradient[some])
    found = _solved(distance, theta, free, batches, gradient, torch.rand(theta.shape).double(), 0.05, 200)
    torch.testing.assert_close(found[some], exact, rtol=1e-6, atol=1e-8)
    assert not found[free == 0].any()


def test_rounds_never_raise_the_distance_on_the_samples_that_judge() -> None:
    distance, theta, (_, learn, judge), _ = posed(vectors, True)
    before = [distance.value(theta, judge)]
    for better, value in descend(distance, theta, torch.ones_like(theta), learn, judge, rounds=6, steps=5, damping=0.1, seed=0):
        assert value == distance.value(better, judge) <= before[-1]
        before.append(value)
    assert len(before) == 7
    assert before[-1] < before[0]


def pruned(tmp_path: Path, structure: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = tiny_data(80, torch.float64)
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), data=(x, y))
    plan = make_plan(score(trajectory, model, criterion="magnitude"), model, x[:1], sparsity=0.7, structure=structure)
    return model, dict(plan.masks()), x, y


@pytest.mark.parametrize("structure", ["unstructured", "channels", "2:4"])
def test_never_further_away_where_it_is_judged_and_zeros_in_place(tmp_path: Path, structure: str) -> None:
    model, masks, x, y = pruned(tmp_path, structure) if structure != "2:4" else pruned_nm(tmp_path)
    before = [p.clone() for p in model.parameters()]
    model.train()
    learn, accept = [(x[:30], y[:30]), (x[30:60], y[30:60])], [(x[60:], y[60:])]
    found = compensate(model, masks, learn, accept=accept)
    again = compensate(model, masks, learn, accept=accept)
    assert found.training
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    named = dict(found.named_parameters())
    assert all(not named[name][~mask.bool()].any() for name, mask in masks.items())
    plain = compensate(model, masks, learn, accept=accept, rounds=0)

    def divergence(other: nn.Module) -> float:
        with torch.no_grad():
            return float(by_hand(other(x[60:]), model(x[60:]), True))

    state = {name: p * masks.get(name, torch.ones_like(p)) for name, p in model.named_parameters()}
    start = float(by_hand(torch.func.functional_call(model, state, (x[60:],)), model(x[60:]), True).detach())
    assert divergence(found) < divergence(plain) <= start + 1e-12


def pruned_nm(tmp_path: Path) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    model, masks, x, y = pruned(tmp_path, "unstructured")
    halves = {name: torch.arange(mask.numel()).view(mask.shape) % 4 < 2 for name, mask in masks.items()}
    return model, halves, x, y


@pytest.mark.slow
def test_one_layer_reaches_the_least_squares_of_its_outputs() -> None:
    """Labels that are no classes: squared error, whose minimum for one linear layer is plain least squares."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    x = tiny_data(60, torch.float64)[0]
    y = torch.randn(60, 3, dtype=torch.float64)
    mask = torch.rand(3, 16) < 0.4
    found = compensate(model, {"1.weight": mask}, [(x, y)], accept=[(x, y)], rounds=8, steps=60)
    given = torch.cat([x.flatten(1), torch.ones(60, 1, dtype=torch.float64)], 1)
    for row in range(3):
        kept = torch.cat([mask[row], torch.ones(1, dtype=torch.bool)])
        best = torch.linalg.lstsq(given[:, kept], model(x)[:, row : row + 1].detach()).solution[:, 0]
        solved = torch.cat([found[1].weight[row], found[1].bias[row : row + 1]]).detach()
        torch.testing.assert_close(solved[kept], best, rtol=1e-4, atol=1e-5)


def test_what_the_output_does_not_need_is_left_alone() -> None:
    """A mask that keeps the network's outputs exactly, and not its layers': least squares on the layers would move weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[3].weight[:, 2] = 0
    x, y = tiny_data(40, torch.float64)
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[2] = False
    by_layer = layerwise(model, {"1.weight": mask}, [(x, y)])
    assert not torch.equal(by_layer[1].bias, model[1].bias)
    found = compensate(model, {"1.weight": mask}, [(x, y)])
    assert torch.equal(found[1].bias, model[1].bias)
    assert torch.equal(found[1].weight, model[1].weight * mask)


def test_options_out_of_range_and_samples_that_lack_are_refused() -> None:
    model = vectors()
    x, y = tiny_data(8)
    masks = {"1.weight": torch.ones(7, 16)}
    for option, value in (("rounds", -1), ("steps", 0), ("damping", -1.0)):
        with pytest.raises(UsageError, match=f"{option} is {value}"):
            compensate(model, masks, [(x, y)], **{option: value})  # type: ignore[arg-type]
    for batches, accept in (([], None), ([(x[:1], y[:1])], None), ([(x, y)], [])):
        with pytest.raises(UsageError, match="samples to accept on"):
            compensate(model, masks, batches, accept=accept)
    with pytest.raises(ArtifactError, match="mask nowhere"):
        compensate(model, {"nowhere": torch.ones(2)}, [(x, y)])


class Backward(torch.autograd.Function):
    """A function with a derivative backward and none forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def test_a_model_without_forward_derivatives_is_compensated_by_backward_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = tiny_data(24, torch.float64)
    masks = {"1.weight": torch.rand(12, 16) < 0.5}
    doubled = model[2].register_forward_hook(lambda module, given, out: out * 2)
    plain = compensate(model, masks, [(x, y)], rounds=1, steps=2)
    doubled.remove()
    model[2].register_forward_hook(lambda module, given, out: Backward.apply(out))
    found = compensate(model, masks, [(x, y)], rounds=1, steps=2)
    for p, q in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_model_without_derivatives_is_compensated_by_layer() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(16, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = self.out(torch.relu(self.inner(x.flatten(1))))
            return found

    torch.manual_seed(0)
    model = Odd().double()
    x, y = tiny_data(60, torch.float64)
    masks = {"inner.weight": torch.rand(12, 16) < 0.5}
    with pytest.warns(UserWarning, match="layer by layer only"):
        found = compensate(model, masks, [(x, y)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # layers alone is what is asked for
        only = compensate(model, masks, [(x, y)], rounds=0)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), only.parameters(), strict=True))


def test_outputs_as_wide_as_a_text_are_compensated_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("prunekit.apply.compensate"), "WIDE", 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = tiny_data(60, torch.float64)
    masks = {"1.weight": torch.rand(12, 16) < 0.5}
    with pytest.warns(UserWarning, match="layer by layer only, since a sample's outputs are 4 numbers"):
        found = compensate(model, masks, [(x, y)])
    only = compensate(model, masks, [(x, y)], rounds=0)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), only.parameters(), strict=True))


@pytest.mark.parametrize("structure", ["unstructured", "channels"])
def test_prune_with_calibration_samples_is_the_compensated_model(tmp_path: Path, structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = tiny_data(40, torch.float64)
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), data=(x, y))
    plan = make_plan(score(trajectory, model, criterion="lamp"), model, x[:1], sparsity=0.5, structure=structure)
    pruned = prune(model, plan, x[:1], calibration=[(x, y)])
    torch.testing.assert_close(pruned(x), compensate(model, plan.masks(), [(x, y)])(x))
    save(pruned, plan, tmp_path / "pruned")
    back = load(tmp_path / "pruned", lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double())
    assert torch.equal(back(x), pruned(x))
    assert sum(int((p != 0).sum()) for p in pruned.parameters()) <= sum(p.numel() for p in model.parameters()) - 128 * 0.4


def test_where_the_whole_step_is_not_a_number_a_shorter_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    distance, theta, (batches, *_), _ = posed(vectors, True)
    plain, steps = Distance.value, iter([False, True])  # where it starts, then the whole step

    def overflowing(self: Distance, theta: Tensor, samples: Any) -> float:
        return float("nan") if next(steps, False) else plain(self, theta, samples)

    monkeypatch.setattr(Distance, "value", overflowing)
    ((better, value),) = descend(
        distance, theta, torch.ones_like(theta), batches, batches, rounds=1, steps=5, damping=0.1, seed=0
    )
    assert value == plain(distance, better, batches) < plain(distance, theta, batches)


def test_a_model_of_several_precisions_that_cannot_be_one_is_refused() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6).bfloat16(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.outer(x + self.inner(x.bfloat16()).float())
            return found

    model = Narrow()
    function = ModelFunction(model, Layout.of(model), {}, "loss")
    for other in (torch.OutOfMemoryError("no memory"), RuntimeError("shapes cannot be multiplied")):
        with pytest.raises(type(other), match=str(other)), function._in_one_kind():
            raise other
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    with pytest.raises(UsageError, match="computes in bfloat16 and float32, and cannot in float32 alone"):
        compensate(model, masks, [(torch.randn(40, 6), torch.zeros(40).long())])
