"""Channels behind gates, splits, shuffles, recurrent layers and parametrised weights: cut exactly, or left whole by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prunekit import make_plan, masked, prune
from prunekit.batch import answers, call, float64
from tests.structure_models import random_scores

SEQUENCE = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv1(*sizes: int) -> nn.Module:
    return nn.Conv1d(*sizes, 3, padding=1)


def conv2(*sizes: int, groups: int = 1) -> nn.Module:
    return nn.Conv2d(*sizes, 3, padding=1, groups=groups)


def gated(gate: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda s, x: s.o(s.b(gate(s.a(x))).mean(-1)), a=conv1(6, 16), b=conv1(8, 10), o=nn.Linear(10, 3))


def chunked(x: Tensor) -> Tensor:
    u, v = x.chunk(2, 1)
    return u * v.sigmoid()


def split(x: Tensor) -> Tensor:
    u, v = torch.split(x, 8, 1)
    return u * v.sigmoid()


def sliced(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:].sigmoid()


def pictured(middle: nn.Module, outputs: int, inputs: int) -> Callable[[], nn.Module]:
    return lambda: Net(
        lambda s, x: s.o(s.b(s.m(s.a(x))).mean((2, 3))), a=conv2(3, outputs), m=middle, b=conv2(inputs, 6), o=nn.Linear(6, 3)
    )


def shuffled(s: Any, x: Tensor) -> Tensor:
    x = s.a(s.stem(x))
    n, c, h, w = x.shape
    return s.o(s.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).relu()).mean((2, 3)))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    width = 12 if options.get("bidirectional") else 6
    return lambda: Net(
        lambda s, x: s.o(s.r(s.e(x))[0].relu()),
        e=nn.Linear(9, 7),
        r=kind(7, 6, batch_first=True, **options),  # type: ignore[arg-type]
        o=nn.Linear(width, 3),
    )


def maxout(x: Tensor) -> Tensor:
    return x.view(len(x), -1, 2).amax(2)


CUT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "glu": (gated(lambda x: F.glu(x, 1)), SEQUENCE, "a"),
    "chunk": (gated(chunked), SEQUENCE, "a"),
    "slices": (gated(sliced), SEQUENCE, "a"),
    "pixel shuffle": (pictured(nn.PixelShuffle(2), 16, 4), PICTURE, "a"),
    "maxout": (
        lambda: Net(lambda s, x: s.b(maxout(s.a(x.mean(1)))), a=nn.Linear(9, 16), b=nn.Linear(8, 5)), SEQUENCE, "a",
    ),
    "channel shuffle": (
        lambda: Net(shuffled, stem=conv2(3, 8), a=conv2(8, 12, groups=2), b=conv2(12, 8, groups=2), o=nn.Linear(8, 3)),
        PICTURE, "a",
    ),
    "depthwise, twice as many": (
        lambda: Net(
            lambda s, x: s.o(s.b(s.d(s.a(x).relu())).mean((2, 3))),
            a=conv2(3, 6), d=conv2(6, 12, groups=6), b=conv2(12, 5), o=nn.Linear(5, 3),
        ), PICTURE, "d",
    ),
    "spectral norm": (pictured(parametrizations.spectral_norm(conv2(8, 8)), 8, 8), PICTURE, "m"),
    "lstm": (recurrent(nn.LSTM), SEQUENCE, "r"),
    "lstm, two layers, both ways": (recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE, "r"),
    "gru": (recurrent(nn.GRU), SEQUENCE, "r"),
    "gru, two layers": (recurrent(nn.GRU, num_layers=2), SEQUENCE, "r"),
    "two inputs by name": (
        lambda: Net(lambda s, left, right: {"out": s.c((s.a(left) + s.b(right)).relu())},
                    a=nn.Linear(9, 8), b=nn.Linear(9, 8), c=nn.Linear(8, 4)),
        {"left": SEQUENCE, "right": SEQUENCE.flip(0)}, "b",
    ),
}  # fmt: skip
"""Model, inputs, a layer that has to lose outputs."""

WHOLE: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "split of a fixed size": (gated(split), SEQUENCE, "a"),
    "weight norm": (pictured(parametrizations.weight_norm(conv2(8, 8)), 8, 8), PICTURE, "m"),
    "projected lstm": (
        lambda: Net(lambda s, x: s.o(s.h(s.r(s.e(x))[0]).relu()), e=nn.Linear(9, 7),
                    r=nn.LSTM(7, 6, proj_size=4, batch_first=True), h=nn.Linear(4, 8), o=nn.Linear(8, 3)),
        SEQUENCE, "r",
    ),
}  # fmt: skip
"""Model, inputs, a layer that is left whole and named."""


def same(model: nn.Module, plan: Any, inputs: Any) -> bool:
    small = prune(model, plan, inputs).eval().double()
    with torch.no_grad():
        found, expected = (answers(call(m, float64(inputs))) for m in (small, masked(model, plan).eval().double()))
        return all(torch.allclose(a, b, atol=1e-9) and bool(a.isfinite().all()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CUT)
def test_channels_are_cut_exactly(name: str) -> None:
    build, inputs, layer = CUT[name]
    torch.manual_seed(0)
    model = build().eval()
    for seed in range(3):
        plan = make_plan(random_scores(model, seed), model, inputs, sparsity=0.4, structure="channels", allocation="uniform")
        assert layer in plan.keep, plan.provenance.get("refused")
        assert not plan.keep[layer].all()
        assert same(model, plan, inputs)


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_cut_is_named_and_the_rest_goes_on(name: str) -> None:
    build, inputs, layer = WHOLE[name]
    torch.manual_seed(0)
    model = build().eval()
    plan = make_plan(random_scores(model), model, inputs, sparsity=0.1, structure="channels", allocation="uniform")
    assert layer in plan.provenance["refused"]
    assert plan.keep
    assert same(model, plan, inputs)


def test_inputs_and_caches_are_never_changed() -> None:
    def run(s: Any, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(s.a(x))
        return s.b(torch.cat(cache, 1).relu())

    model = Net(run, a=nn.Linear(9, 8), b=nn.Linear(8, 4))
    inputs = {"x": SEQUENCE, "cache": []}
    plan = make_plan(random_scores(model), model, inputs, sparsity=0.4, structure="channels")
    assert not plan.keep["a"].all()
    prune(model, plan, inputs)
    assert inputs["cache"] == []
