"""Compensated weights against plain least squares on the layers' inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunekit import ArtifactError, make_plan, score
from prunekit.apply import compensate, masked
from tests.conftest import record, tiny_data


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 9),
        nn.ReLU(), nn.Linear(9, 4),
    ).double()  # fmt: skip


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        found[f"{name}.weight"] = x.detach()
        x = layer(x)
    return found


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, name: str, x: Tensor) -> float:
    """Squared change of the layer's outputs on the dense model's inputs."""
    number = int(name.split(".")[0])
    return float((model[number](x) - other[number](x)).square().sum())  # type: ignore[index]


def random_masks(model: nn.Module, keep: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) < keep for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_error_is_the_least_that_the_mask_allows(samples: int, keep: float) -> None:
    model = net()
    x, y = tiny_data(samples, torch.float64)
    masks = random_masks(model, keep)
    found = compensate(model, masks, [(x[:2], y[:2]), (x[2:], y[2:])])
    uncompensated = net()
    with torch.no_grad():
        for name, parameter in uncompensated.named_parameters():
            parameter.mul_(masks.get(name, torch.ones(())))
    for name, given in inputs_of(model, x).items():
        if name not in masks:
            continue
        weight = dict(model.named_parameters())[name].detach()
        solved = dict(found.named_parameters())[name].detach()
        assert not solved[~masks[name]].any()
        layer = model[int(name.split(".")[0])]

        def outputs(changed: Tensor, layer: nn.Module = layer, given: Tensor = given) -> Tensor:
            return torch.func.functional_call(layer, {"weight": changed}, (given,)).detach().flatten()

        nothing = outputs(torch.zeros_like(weight))
        units = torch.eye(weight.numel()).double()[masks[name].flatten()]
        basis = torch.stack([outputs(unit.view(weight.shape)) - nothing for unit in units], 1)
        wanted = (outputs(weight) - nothing)[:, None]
        best = torch.linalg.lstsq(basis, wanted, driver="gelsd").solution
        least = float((basis @ best - wanted).square().sum())
        reached = error(model, found, name, given)
        assert reached <= error(model, uncompensated, name, given) * (1 + 1e-9) + 1e-12
        assert reached == pytest.approx(least, rel=1e-6, abs=1e-9)
        if torch.linalg.matrix_rank(basis) == basis.shape[1]:
            torch.testing.assert_close(solved[masks[name]], best[:, 0], atol=1e-7, rtol=1e-6)


def test_nothing_removed_changes_nothing() -> None:
    model = net()
    everything = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    found = compensate(model, everything, [tiny_data(5, torch.float64)])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), found.parameters(), strict=True))


def test_a_channel_plan_is_compensated_with_its_zeros_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = tiny_data(40, torch.float64)
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), data=(x, y))
    plan = make_plan(score(trajectory, model, criterion="magnitude"), model, x[:1], sparsity=0.5, structure="channels")
    before = [p.clone() for p in model.parameters()]
    found, plain = compensate(model, plan.masks(), [(x, y)]), masked(model, plan)
    for name, mask in plan.masks().items():
        assert not dict(found.named_parameters())[name][~mask.bool()].any()
    assert (found(x) - model(x)).square().sum() < (plain(x) - model(x)).square().sum()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_damping_holds_weights_back() -> None:
    model = net()
    x, y = tiny_data(40, torch.float64)
    masks = random_masks(model, 0.5)
    dense = dict(model.named_parameters())["5.weight"].detach()[masks["5.weight"]]
    moves = []
    for damping in (0.0, 0.1, 1.0):
        found = dict(compensate(model, masks, [(x, y)], damping).named_parameters())["5.weight"].detach()
        moves.append(float((found[masks["5.weight"]] - dense).norm()))
    assert moves[0] > moves[1] > moves[2] > 0
    with pytest.raises(ValueError, match="damping is -1"):
        compensate(model, masks, [(x, y)], -1.0)
    with pytest.raises(ArtifactError, match="mask nowhere"):
        compensate(model, {"nowhere": torch.ones(2)}, [(x, y)])
