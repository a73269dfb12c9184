"""Every method's solution of one layer against straightforward code in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunekit import PrunekitError
from prunekit.layerwise import METHODS, Amount, Problem, Solved, sparsegpt
from prunekit.layerwise.amount import smallest
from prunekit.layerwise.masked_solve import masked_least_squares
from prunekit.plan.patterns import nm_mask
from prunekit.structure import pattern_of

OUTPUTS, INPUTS, DAMPING = 6, 22, 0.01
AMOUNTS = {
    "layer": Amount(0.6, "layer"), "rows": Amount(0.5, "rows"), "2:4": Amount(0.5, "rows", pattern_of("2:4")),
    "1:3": Amount(2 / 3, "rows", pattern_of("1:3")),
}  # fmt: skip


def problem(groups: int = 1, kind: str | None = "products") -> Problem:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(groups, INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 90, INPUTS, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(groups, OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    moments = x.square().sum(1) if kind == "squares" else x.transpose(1, 2) @ x
    return Problem(weight, moments, DAMPING)


def solved(name: str, amount: Amount, groups: int = 1) -> tuple[Problem, Solved]:
    given = problem(groups, METHODS[name].moments)
    return given, METHODS[name].solve(given, amount)


def error(given: Problem, found: Solved) -> float:
    change = found.weight - given.weight
    return float(((change @ given.curvature()) * change).sum())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", AMOUNTS)
def test_exactly_the_asked_number_goes_where_it_may(name: str, what: str) -> None:
    amount = AMOUNTS[what]
    given, found = solved(name, amount, groups=2)
    assert torch.equal(found.weight != 0, found.keep)
    if not METHODS[name].changes:
        assert torch.equal(found.weight, given.weight * found.keep)
    gone = (~found.keep).flatten(0, 1)
    if amount.pattern is not None:
        assert torch.equal(nm_mask(found.keep.double().flatten(0, 1), amount.pattern.first, amount.pattern.second), ~gone)
    elif what == "rows":
        assert gone.sum(1).tolist() == [round(0.5 * INPUTS)] * 2 * OUTPUTS
    else:
        assert int(gone.sum()) == round(0.6 * gone.numel())


def test_wanda_keeps_the_largest_of_every_row_by_weight_times_norm() -> None:
    given, found = solved("wanda", Amount(0.5, "rows"))
    norms = problem().moments[0].diagonal().sqrt()
    for row, keep in zip(given.weight[0], found.keep[0], strict=True):
        assert set(keep.nonzero().flatten().tolist()) == set((row.abs() * norms).topk(INPUTS // 2).indices.tolist())


def column_by_column(given: Problem, amount: Amount, block: int) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon, an inverse Hessian of what is left a column; what goes is chosen as SparseGPT does."""
    hessian, weight = given.curvature()[0], given.weight[0].clone()
    keep = torch.ones_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(INPUTS)]
    for j in range(INPUTS):
        width = block if amount.pattern is None else amount.pattern.second
        if j % width == 0:
            end = min(j + width, INPUTS)
            worth = torch.stack([weight[:, k] ** 2 / inverses[k][0, 0] for k in range(j, end)], 1)
            if amount.pattern is not None:
                keep[:, j:end] = nm_mask(worth, amount.pattern.first, amount.pattern.second)
            else:
                total = round(amount.sparsity * OUTPUTS * end) - round(amount.sparsity * OUTPUTS * j)
                order = worth.flatten().argsort()
                keep[:, j:end] = torch.ones(worth.numel(), dtype=torch.bool).index_fill(0, order[:total], False).view(worth.shape)
        for output in range(OUTPUTS):
            if not keep[output, j]:
                weight[output, j:] -= weight[output, j] / inverses[j][0, 0] * inverses[j][0]
    return weight, keep


@pytest.mark.parametrize("what", ["layer", "2:4", "1:3"])
def test_sparsegpt_is_optimal_brain_surgeon_column_by_column(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", 12)
    given, found = solved("sparsegpt", AMOUNTS[what])
    weight, keep = column_by_column(given, AMOUNTS[what], 12)
    assert torch.equal(found.keep[0], keep)
    assert torch.allclose(found.weight[0], weight * keep, rtol=1e-8, atol=1e-10)


def by_hand(given: Problem, keep: Tensor) -> Tensor:
    """Least squares on what stays, an output at a time."""
    result = torch.zeros_like(given.weight)
    for group, hessian in enumerate(given.curvature()):
        for output, stays in enumerate(keep[group]):
            wanted = (hessian @ given.weight[group, output])[stays]
            result[group, output, stays] = torch.linalg.solve(hessian[stays][:, stays], wanted)
    return result


def test_the_masked_solution_is_least_squares_on_what_stays() -> None:
    given = problem(2)
    keep = torch.rand(given.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[0, 0] = False  # an output that loses everything
    curvature = given.curvature()
    found = masked_least_squares(given.weight, keep, curvature, given.weight @ curvature, steps=500, tolerance=1e-10)
    assert torch.allclose(found, by_hand(given, keep), rtol=1e-6, atol=1e-8)
    assert not found[~keep].any()


@pytest.mark.parametrize("what", ["layer", "rows", "2:4"])
def test_admm_ends_at_the_least_squares_on_its_places_ahead_of_sparsegpt(what: str) -> None:
    given, found = solved("admm", AMOUNTS[what], groups=2)
    least = Solved(by_hand(given, found.keep), found.keep)
    assert error(given, found) <= (1 + 1e-5) * error(given, least)
    others = [error(given, solved(name, AMOUNTS[what], groups=2)[1]) for name in ("magnitude", "wanda", "sparsegpt")]
    assert error(given, found) < 0.7 * min(others)


@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
def test_groups_are_solved_each_by_its_own_inputs(name: str) -> None:
    both = problem(2)
    amount = Amount(0.5, "rows")
    together = METHODS[name].solve(both, amount)
    for group in range(2):
        alone = METHODS[name].solve(Problem(both.weight[group : group + 1], both.moments[group : group + 1], DAMPING), amount)
        assert torch.equal(alone.keep[0], together.keep[group])
        assert torch.allclose(alone.weight[0], together.weight[group], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
def test_inputs_that_are_nothing_or_depend_on_one_another(name: str) -> None:
    weight = problem().weight
    nothing = METHODS[name].solve(Problem(weight, torch.zeros(1, INPUTS, INPUTS, dtype=torch.float64), 0.0), Amount(0.5, "rows"))
    assert torch.allclose(nothing.weight, weight * nothing.keep)
    same = torch.ones(1, INPUTS, INPUTS, dtype=torch.float64)
    with pytest.raises(PrunekitError, match="depend on one another, and damping is 0; give a larger one"):
        METHODS[name].solve(Problem(weight, same, 0.0), Amount(0.5, "rows"))
    assert METHODS[name].solve(Problem(weight, same, DAMPING), Amount(0.5, "rows")).weight.isfinite().all()


def test_the_smallest_of_equals_are_the_first() -> None:
    values = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 1.0]])
    assert smallest(values, 3).tolist() == [[True, True, False, True, False], [True, True, False, False, True]]
    assert not smallest(values, 0).any()
    assert smallest(values, 5).all()
