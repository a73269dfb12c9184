"""Both ways to per-sample gradients give the gradients, and the choice between them is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.kernel import ModelFunction, layer_gradients
from prunekit.kernel.gradients import GradientEngine, VmapGradients, choose_engine
from prunekit.kernel.layer_gradients import LayerwiseGradients
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


class Signals(nn.Module):
    """One-dimensional convolutions, on rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=1)
        self.outer = nn.Conv1d(6, 4, 2, padding="same", groups=2, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x[:, 0]))).flatten(1)[:, :3]


class Tokens(nn.Module):
    """Embeddings with a padding row, read per sample, and positions by ``position``; attention of separate layers."""

    def __init__(self, position: str) -> None:
        super().__init__()
        self.token = nn.Embedding(5, 6, padding_idx=0)
        self.position: nn.Module | nn.Parameter = nn.Embedding(16, 6)
        if position == "parameter":
            self.position = nn.Parameter(torch.randn(16, 6))
        elif position == "parameter with a sample axis":
            self.position = nn.Parameter(torch.randn(1, 16, 6))
        self.begin = nn.Parameter(torch.randn(1, 1, 6))
        self.how, self.norm, self.last = position, nn.LayerNorm(6), nn.RMSNorm(6)
        self.q, self.k, self.v, self.o = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).abs().mul(2).long().clamp(max=4)
        numbers = torch.arange(16) if self.how == "numbers" else torch.arange(16)[None]
        position = self.position(numbers) if isinstance(self.position, nn.Module) else self.position
        h = self.token(tokens) + position
        h = torch.cat([self.begin.expand(len(h), -1, -1), h], 1)
        a = self.norm(h)
        q, k, v = (layer(a).unflatten(2, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = h + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.last(h)[:, -1])


class Attention(nn.Module):
    """Weights used by a function, not by a layer's call; and rows as the batch axis."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0] if self.attention.batch_first else x[:, 0].transpose(0, 1)
        out: Tensor = self.attention(rows, rows, rows, need_weights=False)[0]
        return self.head(out).sum(1 if self.attention.batch_first else 0)


class SequenceFirst(nn.Module):
    """Samples on the second axis: what a layer sees first is the position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x[:, 0].transpose(0, 1)))).sum(0)


class Flat(nn.Module):
    """Positions folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.norm(self.inner(x.reshape(-1, 4))))).view(len(x), -1, 3).sum(1)


def normed(norm: nn.Module) -> nn.Module:
    return on_images(nn.Conv2d(1, 4, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(4, 3, 2))


COVERED: dict[str, Callable[[], nn.Module]] = {
    "plain": TinyNet,
    "in-place relu": lambda: on_images(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2), nn.ReLU(inplace=True)),
    "stride, dilation": lambda: on_images(nn.Conv2d(1, 4, 3, stride=2, padding=2, dilation=2), nn.Tanh()),
    "same padding": lambda: on_images(nn.Conv2d(1, 4, (2, 3), padding="same"), nn.Tanh()),
    "circular padding": lambda: on_images(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Tanh()),
    "groups": lambda: on_images(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, groups=2), nn.Tanh()),
    "depthwise": lambda: on_images(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=4), nn.Tanh()),
    "one-dimensional": Signals,
    "sequences": Sequences,
    "positions in the batch axis": Flat,
    "called twice": Twice,
    "layer norm": lambda: on_images(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 5), nn.Tanh()),
    "layer norm of two axes": lambda: on_images(nn.LayerNorm((4, 4)), nn.Conv2d(1, 4, 3), nn.LayerNorm(2, bias=False), nn.Tanh()),
    "batch norm": lambda: normed(nn.BatchNorm2d(4)),
    "batch norm of vectors": lambda: on_images(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 5), nn.Tanh()),
    "group norm": lambda: normed(nn.GroupNorm(2, 4)),
    "transformer, numbered positions": lambda: Tokens("numbers"),
    "transformer, positions in a row": lambda: Tokens("row of numbers"),
    "transformer, bare positions with a sample axis": lambda: Tokens("parameter with a sample axis"),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "tied outside": Tied,
    "transformer, bare positions": lambda: Tokens("parameter"),
    "attention module": lambda: Attention(batch_first=True),
    "attention module, sequence first": lambda: Attention(batch_first=False),
    "sequence first": SequenceFirst,
    "a layer without a rule": lambda: on_images(nn.ConvTranspose2d(1, 3, 2), nn.Tanh()),
}


def made(
    build: Callable[[], nn.Module], target: str = "outputs", samples: int = 5
) -> tuple[ModelFunction, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    model = build()
    x, y = tiny_data(samples)
    model(x)
    model.double()
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5) if "running" in name else None
    layout = Layout.of(model)
    theta = layout.flatten({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return ModelFunction(model, layout, target=target), theta, x.double(), y % 3


def straightforward(function: ModelFunction, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One backward pass for each sample and target: ``(samples, targets, P)``."""
    rows = []
    for n in range(len(x)):
        leaf = theta.clone().requires_grad_()
        values = function(leaf, x[n : n + 1], y[n : n + 1])[0]
        rows.append(torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in values]))
    return torch.stack(rows)


def check(engine: GradientEngine, function: ModelFunction, theta: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds scaled gradients to ones and compares with the straightforward ones."""
    expected = straightforward(function, theta, x, y)
    scale = function.layout.views(torch.randn_like(theta))
    into = {e.name: torch.ones(len(x), expected.shape[1], *e.shape, dtype=theta.dtype) for e in function.layout.parameters}
    engine.accumulate(theta, x, y, scale, into)
    for entry in function.layout.parameters:
        wanted = 1 + expected[:, :, entry.span].view_as(into[entry.name]) * scale[entry.name]
        torch.testing.assert_close(into[entry.name], wanted)


@pytest.mark.parametrize("target", ["outputs", "margin", "loss"])
@pytest.mark.parametrize(("name", "build"), [*COVERED.items(), *OTHERS.items()])
def test_chosen_engine_gives_scaled_gradients(name: str, build: Callable[[], nn.Module], target: str) -> None:
    function, theta, x, y = made(build, target)
    engine = choose_engine(function, theta, x, y)
    assert isinstance(engine, LayerwiseGradients if name in COVERED else VmapGradients)
    check(engine, function, theta, x, y)


@pytest.mark.parametrize("samples", [1, 2, 16])
@pytest.mark.parametrize("name", ["transformer, numbered positions", "transformer, positions in a row"])
def test_as_many_samples_as_positions(name: str, samples: int) -> None:
    function, theta, x, y = made(COVERED[name], "margin", 16)
    engine = choose_engine(function, theta, x, y)
    assert isinstance(engine, LayerwiseGradients)
    check(engine, function, theta, x[:samples], y[:samples])


@pytest.mark.parametrize("name", ["plain", "one-dimensional", "called twice"])
def test_blocks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, theta, x, y = made(COVERED[name])
    for size in (1, 3000):
        monkeypatch.setattr(layer_gradients, "BLOCK", size)
        check(LayerwiseGradients(function), function, theta, x, y)


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


def test_gradients_of_a_table_are_added_to_a_part_of_a_wider_tensor() -> None:
    index = torch.tensor([[0, 2, 2], [1, 0, 1]])
    rows = layer_gradients.Rows(index, torch.randn(2, 3, 3, 4))
    scale = torch.rand(5, 4)
    alone, wide = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 2 + 5 * 4)
    rows.add(alone, scale)
    rows.add(wide[..., 2:].unflatten(-1, (5, 4)), scale)
    torch.testing.assert_close(wide[..., 2:].reshape(2, 3, 5, 4), alone)
    assert not wide[..., :2].any()
