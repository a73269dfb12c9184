"""Both ways to per-sample gradients give the gradients, and the choice between them is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.kernel import ModelFunction
from prunekit.kernel.gradients import VmapGradients, choose_engine
from prunekit.kernel.layerwise import LayerwiseGradients
from prunekit.trajectory import Layout
from tests.conftest import TinyNet, tiny_data


def on_images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x[:, 0]))).sum(1)


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x.flatten(1))))[:, :3]


class Tied(nn.Module):
    """A weight that is also used outside its layer: hooks on layers cannot see that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x.flatten(1))), self.layer.weight.t())[:, :3]


COVERED: dict[str, Callable[[], nn.Module]] = {
    "plain": TinyNet,
    "in-place relu": lambda: on_images(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2), nn.ReLU(inplace=True)),
    "stride, dilation": lambda: on_images(nn.Conv2d(1, 4, 3, stride=2, padding=2, dilation=2), nn.Tanh()),
    "same padding": lambda: on_images(nn.Conv2d(1, 4, (2, 3), padding="same"), nn.Tanh()),
    "circular padding": lambda: on_images(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Tanh()),
    "groups": lambda: on_images(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, groups=2), nn.Tanh()),
    "depthwise": lambda: on_images(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=4), nn.Tanh()),
    "sequences": Sequences,
    "called twice": Twice,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: on_images(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 5), nn.Tanh()),
    "tied outside": Tied,
}


def made(build: Callable[[], nn.Module], target: str = "outputs") -> tuple[ModelFunction, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    model = build()
    x, y = tiny_data(5)
    model(x)
    model.double()
    layout = Layout.of(model)
    theta = layout.flatten(dict(model.named_parameters()))
    return ModelFunction(model, layout, target=target), theta, x.double(), y % 3


def straightforward(function: ModelFunction, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One backward pass for each sample and target: ``(samples, targets, P)``."""
    rows = []
    for n in range(len(x)):
        leaf = theta.clone().requires_grad_()
        values = function(leaf, x[n : n + 1], y[n : n + 1])[0]
        rows.append(torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in values]))
    return torch.stack(rows)


@pytest.mark.parametrize("target", ["outputs", "margin", "loss"])
@pytest.mark.parametrize(("name", "build"), [*COVERED.items(), *OTHERS.items()])
def test_chosen_engine_gives_scaled_gradients(name: str, build: Callable[[], nn.Module], target: str) -> None:
    function, theta, x, y = made(build, target)
    expected = straightforward(function, theta, x, y)
    engine = choose_engine(function, theta, x, y)
    assert isinstance(engine, LayerwiseGradients if name in COVERED else VmapGradients)
    scale = function.layout.views(torch.randn_like(theta))
    into = {e.name: torch.ones(len(x), expected.shape[1], *e.shape, dtype=theta.dtype) for e in function.layout}
    engine.accumulate(theta, x, y, scale, into)
    for entry in function.layout:
        wanted = 1 + expected[:, :, entry.span].view_as(into[entry.name]) * scale[entry.name]
        torch.testing.assert_close(into[entry.name], wanted)


def test_users_model_is_left_alone() -> None:
    model = TinyNet()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layout = Layout.of(model)
    function = ModelFunction(model, layout)
    x, y = tiny_data(4)
    choose_engine(function, layout.flatten(dict(model.named_parameters())), x, y)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
