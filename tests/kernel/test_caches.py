"""Modules that keep what they computed from their weights: prunekit looks at one model at many weights, and no cache may lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Trajectory, make_plan, masked, score
from prunekit.batch import call
from prunekit.traceless import traceless
from prunekit.trajectory.copies import copied
from tests.conftest import record

X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


class Keeping(nn.Module):
    """In evaluation mode the product of two weights is computed once: LeViT does so with its attention's biases."""

    def __init__(self, drops: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.drops = nn.Linear(5, 6), nn.Linear(6, 3), drops
        self.kept: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.runs = 0

    def train(self, mode: bool = True) -> Keeping:
        if mode and self.drops:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.training:
            product = self.second.weight @ self.first.weight
        else:
            if "product" not in self.kept:
                self.kept["product"] = self.second.weight @ self.first.weight
            product = self.kept["product"]
        self.last = torch.tanh(F.linear(x, product))
        return self.last


class Plain(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.second.weight @ self.first.weight))


def trained(folder: Path, kind: type[Keeping]) -> tuple[nn.Module, Trajectory]:
    torch.manual_seed(0)
    model = kind()
    trajectory = record(folder, model, torch.optim.SGD(model.parameters(), 0.3), data=(X, Y))
    return model.eval(), trajectory


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "gradient", "influence"])
def test_scores_are_those_of_a_model_that_keeps_nothing(tmp_path: Path, criterion: str) -> None:
    found = []
    for kind in (Keeping, Plain):
        model, trajectory = trained(tmp_path / kind.__name__, kind)
        model(X)  # fills the cache, with a graph
        found.append(score(trajectory, model, [(X, Y)], criterion=criterion).importance)
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected)


def test_a_mask_is_not_passed_by_through_a_cache(tmp_path: Path) -> None:
    model, trajectory = trained(tmp_path, Keeping)
    with torch.no_grad():
        model(X)
    plan = make_plan(score(trajectory, model, criterion="magnitude"), model, X[:2], sparsity=0.6)
    found = masked(model, plan).eval()
    weights = dict(found.named_parameters())
    expected = torch.tanh(F.linear(X, weights["second.weight"] @ weights["first.weight"]))
    torch.testing.assert_close(found(X), expected)
    assert int((weights["first.weight"] == 0).sum()) > 0


@pytest.mark.parametrize("drops", [True, False])
def test_a_filled_cache_is_copied_as_values(drops: bool) -> None:
    model = Keeping(drops).eval()
    answer = model(X)
    other = copied(model)
    assert other is not model
    assert all(tensor.grad_fn is None for tensor in other.kept.values())  # type: ignore[union-attr, operator]
    assert bool(other.kept) is not drops
    torch.testing.assert_close(other(X), answer)
    assert model.kept["product"].grad_fn is not None


def test_a_call_takes_out_tensors_and_leaves_counters() -> None:
    model = Keeping().eval()
    earlier = torch.ones(2)
    model.last = earlier
    call(model, X)
    assert (model.kept, model.runs) == ({}, 1)
    assert model.last is earlier
    model.kept["other"] = earlier
    with pytest.raises(RuntimeError, match="stopped"):
        stopped(model, left := [])
    assert sorted(left[0]) == ["kept", "last"]
    assert model.last is earlier
    assert list(model.kept) == ["other"]


def stopped(model: Keeping, names: list[list[str]]) -> None:
    with traceless(model) as left:
        names.append(left)
        model(X)
        del model.last
        raise RuntimeError("stopped")
