"""Blame of a mean target: it sums to the change, and is what attribution of single samples averages to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.kernel import ModelFunction, attribute, blame, mean_gradient, mean_value, second_moments, shares_by_layer
from prunekit.kernel.gradients import VmapGradients
from prunekit.kernel.layer_gradients import LayerwiseGradients
from prunekit.trajectory import Layout, Segment
from tests.conftest import TinyNet, tiny_data
from tests.kernel.test_gradients import SequenceFirst, Sequences, Signals, Tokens, Twice
from tests.reference import kl_target


def pruning(model: nn.Module, share: float = 0.5) -> tuple[Layout, Segment, Tensor]:
    layout = Layout.of(model)
    dense = layout.flatten(dict(model.named_parameters()))
    keep = torch.rand(len(dense), generator=torch.Generator().manual_seed(1)) > share
    return layout, Segment(0, dense, dense * keep, torch.zeros_like(dense)), keep


def divergence_of(model: nn.Module, layout: Layout, batches: list[tuple[Tensor, Tensor]]) -> tuple[ModelFunction, list]:
    with torch.no_grad():
        pairs = [(x, F.log_softmax(model(x), -1)) for x, _ in batches]
    return ModelFunction(model, layout, target=kl_target), pairs


def uneven(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    x, y = tiny_data(23, dtype)
    return list(zip(x.split([16, 4, 3]), y.split([16, 4, 3]), strict=True))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(2)
    model = TinyNet().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def test_blame_sums_to_the_divergence_within_its_residual(net: nn.Module) -> None:
    layout, segment, keep = pruning(net)
    function, batches = divergence_of(net, layout, uneven())
    found = blame(function, segment, batches)
    # the divergence by straightforward code
    pruned = TinyNet().double()
    pruned.load_state_dict(layout.views(segment.end))
    x = torch.cat([x for x, _ in batches])
    p, q = net(x).softmax(-1), pruned(x).softmax(-1)
    exact = float((p * (p / q).log()).sum(-1).mean().detach())
    assert exact > 0.05
    assert found.change == pytest.approx(exact, rel=1e-10)
    assert float(found.values.sum()) + found.residual == pytest.approx(exact, rel=1e-10)
    assert abs(found.residual) < 0.02 * exact
    assert not found.values[keep].any()
    finer = [abs(blame(function, segment, batches, nodes=n).residual) for n in (4, 16, 64)]
    assert finer[2] < 0.1 * finer[1] < 0.01 * finer[0] * 1.5  # the midpoint rule is of second order on a smooth net


def test_blame_is_the_mean_of_single_samples_attribution(net: nn.Module) -> None:
    layout, segment, _ = pruning(net)
    function, batches = divergence_of(net, layout, uneven())
    found = blame(function, segment, batches, nodes=5)
    x, reference = (torch.cat(part) for part in zip(*batches, strict=True))
    parts = list(attribute(function, lambda: [segment], x, reference, nodes=5, share="whole"))
    one = {n: torch.cat([p.scores[n] for p in parts]).sum((0, 1)) / len(x) for n in parts[0].scores}
    torch.testing.assert_close(found.values, layout.flatten(one), atol=1e-12, rtol=1e-9)


def test_blame_of_a_layer_is_what_eval_says_of_it(net: nn.Module) -> None:
    layout, segment, _ = pruning(net)
    function, batches = divergence_of(net, layout, uneven())
    found = layout.views(blame(function, segment, batches, nodes=6).values)
    x, reference = (torch.cat(part) for part in zip(*batches, strict=True))
    for layer, share in shares_by_layer(function, segment, x, reference, nodes=6).items():
        mine = sum(float(v.sum()) for n, v in found.items() if n.startswith(f"{layer}."))
        assert mine == pytest.approx(float(share.sum(1).mean()), rel=1e-9, abs=1e-12)


def test_mean_value_and_gradient_do_not_depend_on_batches(net: nn.Module) -> None:
    layout = Layout.of(net)
    theta = layout.flatten(dict(net.named_parameters()))
    function = ModelFunction(net, layout, target="loss")
    x, y = tiny_data(23, torch.float64)
    F.cross_entropy(net(x), y).backward()
    expected = layout.flatten({n: p.grad for n, p in net.named_parameters()})
    for batches in ([(x, y)], uneven()):
        value, gradient = mean_gradient(function, theta, batches)
        assert value == pytest.approx(float(F.cross_entropy(net(x), y).detach()), rel=1e-12)
        assert mean_value(function, theta, batches) == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=1e-10)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution and linear": TinyNet,
    "linear on sequences": Sequences,
    "a layer called twice": Twice,
    "one-dimensional, grouped": Signals,
    "embeddings, norms, attention": lambda: Tokens("numbers"),
    "positions beside a sample axis": lambda: Tokens("parameter with a sample axis"),
    "vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)),
    "samples on the second axis": SequenceFirst,
}


@pytest.mark.parametrize("target", ["margin", "outputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_second_moments_are_those_of_single_gradients(name: str, target: str) -> None:
    torch.manual_seed(0)
    model = LAYERS[name]().double().eval()
    layout = Layout.of(model)
    theta = layout.flatten({**dict(model.named_parameters()), **dict(model.named_buffers())})
    x, y = tiny_data(9, torch.float64)
    y = y % 3
    function = ModelFunction(model, layout, target=target)
    expected = torch.zeros_like(theta)
    for k in range(len(x)):
        for column in range(function(theta, x[:1], y[:1]).shape[1]):
            at = theta.clone().requires_grad_()
            gradient = torch.autograd.grad(function(at, x[k : k + 1], y[k : k + 1])[0, column], at)[0]
            expected += gradient.square()
    for entry in layout:
        if entry.kind == "buffer":
            expected[entry.span] = 0
    batches = list(zip(x.split(4), y.split(4), strict=True))
    torch.testing.assert_close(second_moments(function, theta, batches), expected, atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(second_moments(function, theta, batches, VmapGradients(function)), expected, atol=1e-12, rtol=1e-8)


def test_covered_layers_take_the_fast_way(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of(net)
    theta = layout.flatten(dict(net.named_parameters()))
    calls = []
    original = LayerwiseGradients.squares
    monkeypatch.setattr(LayerwiseGradients, "squares", lambda *a: calls.append(1) or original(*a))
    second_moments(ModelFunction(net, layout, target="margin"), theta, uneven())
    assert len(calls) == 3
