"""What a layer's outputs are added to, and who makes up for blocks that are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import Trajectory, make_plan, masked, score
from prunekit.apply import apply_masks, layerwise
from prunekit.apply.sums import following
from prunekit.trajectory.copies import copied
from tests.blocks.models import family
from tests.transformer_models import first

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class One(nn.Module):
    """A layer, and what becomes of its outputs."""

    def __init__(self, then: Callable[[One, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.other, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self._then = then

    def forward(self, x: Tensor) -> Any:
        return self._then(self, x, self.layer(x))


def in_place(self: One, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x += y
    return x


CASES: dict[str, tuple[Callable[[One, Tensor, Tensor], Any], Callable[[One, Tensor], Tensor] | None]] = {
    "added": (lambda s, x, y: x + y, lambda s, x: x),
    "added to": (lambda s, x, y: y + x, lambda s, x: x),
    "in place": (in_place, lambda s, x: x),
    "in another shape": (lambda s, x, y: x.flatten(0, 1) + y.reshape(-1, 4), lambda s, x: x),
    "through dropout": (lambda s, x, y: x + nn.functional.dropout(y, 0.5, False), lambda s, x: x),
    "in another kind": (lambda s, x, y: x + y.float().double(), lambda s, x: x),
    "parallel": (lambda s, x, y: x + (y + s.other(x)), lambda s, x: s.other(x) + x),
    "then read": (lambda s, x, y: (z := x + y) + s.other(s.norm(z)), lambda s, x: x),
    "a number is added": (lambda s, x, y: x + y + 1.0, lambda s, x: x),
    "read first": (lambda s, x, y: x + s.norm(y), None),
    "scaled": (lambda s, x, y: x + 0.5 * y, None),
    "subtracted": (lambda s, x, y: x - y, None),
    "itself": (lambda s, x, y: y + y, None),
    "in pieces": (lambda s, x, y: x.view(3, 5, 2, 2) + y.view(3, 5, 2, 2), lambda s, x: x),
    "turned": (lambda s, x, y: x.mT + y.mT, None),
    "after a number": (lambda s, x, y: x + (y + torch.zeros(())), lambda s, x: x),
    "wider": (lambda s, x, y: x[None].expand(2, 3, 5, 4) + y, None),
    "alone": (lambda s, x, y: y, None),
    "read again after it was added": (lambda s, x, y: (x + y) + s.norm(y), None),
    "its own place read again": (lambda s, x, y: s.norm(y.add_(x)), lambda s, x: x),
    "added twice": (lambda s, x, y: (x + y) + (x + y), None),
    "a smaller sum is read again": (lambda s, x, y: ((z := x + y) + x) + s.norm(z), lambda s, x: x),
    "taken back": (lambda s, x, y: (x + y) - 3 * y, None),
    "given back beside it": (lambda s, x, y: (x + y, y), None),
    "given back beside a larger sum": (lambda s, x, y: ((z := x + y) + x, z), lambda s, x: x),
    "both spread": (lambda s, x, y: y + torch.ones(2, 1, 1, 1).double(), None),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_an_addition_counts_until_something_else_reads_it(case: str) -> None:
    then, wanted = CASES[case]
    model = One(then).double()
    with torch.no_grad(), following([model.layer], []) as sums:
        for factor in (1, 2):
            sums.end(model(factor * X))
    assert len(sums.found) == 2
    with torch.no_grad():
        for factor, found in zip((1, 2), sums.found, strict=True):
            if wanted is None:
                assert found is None
            else:
                assert found is not None
                torch.testing.assert_close(found, wanted(model, factor * X))


@pytest.mark.parametrize("shape", [(3, 5, 4), (15, 4)])
def test_what_a_layer_that_is_gone_adds_later_counts_too(shape: tuple[int, ...]) -> None:
    def then(self: One, x: Tensor, y: Tensor) -> Tensor:
        z = (x + y).view(shape)
        return z + self.other(self.norm(z)).view(shape)

    model = One(then).double()
    with torch.no_grad(), following([model.layer], [model.other]) as sums:
        model(X)
        z = X + model.layer(X)
        torch.testing.assert_close(sums.found[0], X + model.other(model.norm(z)))


def test_layers_that_are_gone_may_be_added_to_each_other_first() -> None:
    def then(self: One, x: Tensor, y: Tensor) -> Tensor:
        z = x + y
        return (self.other(self.norm(z)) + self.other(z)) + z

    model = One(then).double()
    with torch.no_grad(), following([model.layer], [model.other]) as sums:
        model(X)
        z = X + model.layer(X)
        torch.testing.assert_close(sums.found[0], X + (model.other(model.norm(z)) + model.other(z)))


class Scores(nn.Module):
    """Every two places of a sample, as graph attention scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.one(x) + self.two(x).mT)
        return found


def test_outputs_that_are_spread_over_another_are_no_sum() -> None:
    torch.manual_seed(0)
    model = Scores().double()
    masks = {name: torch.rand(p.shape) < 0.6 for name, p in model.named_parameters() if p.dim() > 1}
    found = layerwise(model, masks, [(X, None)], damping=0)
    apart = layerwise(model, masks, [(X, None)], damping=0, inputs="dense")
    torch.testing.assert_close(found.one.weight, apart.one.weight)  # its inputs are the same in both


class Changing(nn.Module):
    """Writes into the stream in place, or not."""

    def __init__(self, in_place: bool, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.inner, self.outer, self.in_place = nn.Linear(6, 9), nn.Linear(9, 6), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(torch.relu(self.inner(self.norm(x))))
        if not self.in_place:
            return x + y
        x += y
        return x


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", ["Listed", "Sequence"])
def test_a_stream_that_is_changed_in_place_is_the_same_stream(kind: str, norm: bool) -> None:
    """Samples stay as they are, although the first block changes what it is given."""
    found = []
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for in_place in (False, True):
        torch.manual_seed(0)
        model = {"Listed": Listed, "Sequence": Sequence}[kind]([Changing(in_place, norm) for _ in range(4)], nn.Linear(6, 2))
        masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
        given = x.clone()
        found.append(layerwise(model.double(), masks, [(given, None)]))
        assert torch.equal(given, x)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_that_is_called_again_keeps_its_own_outputs() -> None:
    """What a later call's sum lacks holds what the earlier calls of the same layer did, which would count once a call."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Writing(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.block(x)
            found: Tensor = self.head(x)
            return found

    torch.manual_seed(0)
    model, x = Again().double(), torch.randn(200, 6, dtype=torch.float64)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    plain = copied(model)
    apply_masks(plain, masks)
    with torch.no_grad():
        dense, before, after = (each(x) for each in (model, plain, layerwise(model, masks, [(x, None)])))
    assert (after - dense).square().mean() < (before - dense).square().mean()


def test_what_rules_places_out_is_no_sum() -> None:
    class Ruled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            ruled_out = torch.zeros(5, dtype=x.dtype).index_fill(0, torch.tensor([1]), -torch.inf)
            return (self.second(torch.relu(self.first(x))) + ruled_out).softmax(-1)

    torch.manual_seed(0)
    model = Ruled().double()
    masks = {name: torch.rand(p.shape) < 0.6 for name, p in model.named_parameters() if p.dim() > 1}
    found = layerwise(model, masks, [(X, None)])
    assert all(bool(p.isfinite().all()) for p in found.parameters())
    assert not torch.equal(found.second.weight, model.second.weight * masks["second.weight"])


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.outer(torch.relu(self.inner(self.norm(x))))
        return found


class Listed(nn.Module):
    """Blocks that are passed one by one."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class Sequence(Listed):
    """The same, passed as a whole: blocks are no list of modules."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__([], head)
        self.blocks = nn.Sequential(*blocks)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Listed, Sequence])
@pytest.mark.parametrize("gone", [(1,), (1, 2), (0, 3), (0, 1, 2)])
def test_who_writes_last_before_blocks_that_are_gone_writes_what_they_did(kind: Any, gone: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = kind([Writing() for _ in range(4)], nn.Linear(6, 2)).double()
    x = torch.randn(80, 6, dtype=torch.float64)
    masks = {
        name: torch.full_like(p, not any(name.startswith(f"blocks.{n}.") for n in gone), dtype=torch.bool)
        for name, p in model.named_parameters()
        if name != "head.weight"
    }
    found = layerwise(model, masks, [(x[:30], None), (x[30:], None)], damping=0)
    with torch.no_grad():
        streams = [x]
        for block in model.blocks:
            streams.append(block(streams[-1]))
        now = x
        for number, block in enumerate(found.blocks):
            if number in gone:
                assert not any(p.any() for p in block.parameters())
                continue
            last = number + 1
            while last in gone:
                last += 1
            features = torch.cat([torch.relu(block.inner(block.norm(now))), torch.ones(80, 1).double()], 1)
            best = torch.linalg.lstsq(features, streams[last] - now).solution
            torch.testing.assert_close(torch.cat([block.outer.weight.T, block.outer.bias[None]]), best, rtol=1e-6, atol=1e-8)
            now = block(now)
        plain = x
        for number, block in enumerate(model.blocks):
            plain = plain if number in gone else block(plain)
        assert (now - streams[-1]).square().mean() < (plain - streams[-1]).square().mean()


def test_a_convolution_makes_up_for_what_the_sum_lacks() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1, groups=2)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.first(x) + self.second(x))

    model, x = Branches().double(), torch.randn(12, 2, 5, 5, dtype=torch.float64)
    masks = {"first.weight": torch.zeros_like(first.weight).bool(), "second.weight": torch.ones_like(second.weight).bool()}
    found = layerwise(model, masks, [(x, None)], damping=0)
    with torch.no_grad():
        wanted = (model.first(x) + model.second(x) - found.first(x)).movedim(1, -1).reshape(-1, 4)
        patches = nn.functional.unfold(x, 3, padding=1).view(12, 2, 9, 25)
        for out in range(4):
            own = patches[:, out // 2].movedim(1, -1).reshape(-1, 9)
            features = torch.cat([own, torch.ones(len(own), 1).double()], 1)
            best = torch.linalg.lstsq(features, wanted[:, out : out + 1]).solution[:, 0]
            torch.testing.assert_close(torch.cat([found.second.weight[out].flatten(), found.second.bias[out, None]]), best)


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "t5", "vit", "bert", "mixtral"])
def test_blocks_that_are_gone_are_made_up_for_whatever_the_family(name: str) -> None:
    model, batches = family(name, samples=24)
    model.float()
    batches = [({key: t.float() if t.is_floating_point() else t for key, t in x.items()}, None) for x, _ in batches]
    scores = score(Trajectory.of(model), model, criterion="magnitude")
    plan = make_plan(scores, model, batches[0][0], sparsity=0.5, structure="layers")
    dense, plain, found = (
        torch.cat([first(each, x).flatten() for x, _ in batches])
        for each in (model, masked(model, plan), layerwise(model, plan, batches, task="unlabelled"))
    )
    assert (found - dense).square().mean() < 0.6 * (plain - dense).square().mean()
