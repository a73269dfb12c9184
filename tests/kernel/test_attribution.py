"""Scores along the path are what the formula says, however they are chunked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunekit import Trajectory
from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, attribute, get_rule
from tests.conftest import TinyNet, record, tiny_data

Run = tuple[nn.Module, Trajectory]


def whole(run: Run, x: Tensor, y: Tensor, **options: object) -> Tensor:
    model, trajectory = run
    function = ModelFunction(model, trajectory.layout, trajectory.fixed)
    parts = list(attribute(function, trajectory.segments, x, y, **options))  # type: ignore[arg-type]
    names = [e.name for e in trajectory.layout.parameters]
    return torch.cat([torch.cat([p.scores[n].flatten(2) for n in names], 2) for p in parts])


def test_equals_the_formula_by_finite_differences(tiny_run: Run) -> None:
    """Σ_s U_s · φ_s with φ from central differences of the logits, weight by weight."""
    model, trajectory = tiny_run
    x, y = tiny_data(3, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    expected = torch.zeros(3, 4, trajectory.layout.total, dtype=torch.float64)
    for segment in trajectory.segments():
        middle = (segment.start + segment.end) / 2
        for i in range(trajectory.layout.total):
            nudge = torch.zeros_like(middle)
            nudge[i] = 1e-6
            slope = (function(middle + nudge, x, y) - function(middle - nudge, x, y)) / 2e-6
            expected[:, :, i] += slope * segment.data_update[i]
    torch.testing.assert_close(whole(tiny_run, x, y), expected, atol=1e-7, rtol=1e-5)


def test_shares_sum_to_the_change_of_the_outputs(tiny_run: Run) -> None:
    """f_0 + Σ_i (ψ_i + ψ_i^reg) = f_N up to quadrature, less with more nodes."""
    model, trajectory = tiny_run
    x, y = tiny_data(6, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    change = function(trajectory.state(-1), x, y) - function(trajectory.state(0), x, y)
    errors = []
    for nodes in (1, 4, 16):
        total = whole(tiny_run, x, y, nodes=nodes).sum(2) + whole(tiny_run, x, y, nodes=nodes, share="regularisation").sum(2)
        errors.append(float((total - change).abs().max() / change.abs().max()))
        torch.testing.assert_close(total, whole(tiny_run, x, y, nodes=nodes, share="whole").sum(2))
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 10  # the midpoint rule: 16 times less for 4 times the nodes


def test_chunks_do_not_matter(tiny_run: Run) -> None:
    x, y = tiny_data(40, torch.float64)
    at_once = whole(tiny_run, x, y)
    one_by_one = whole(tiny_run, x, y, memory=1)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-14, rtol=1e-10)


def test_ticks_count_every_sample_and_piece(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(40, torch.float64)
    ticks: list[int] = []
    function = ModelFunction(model, trajectory.layout)
    list(attribute(function, trajectory.segments, x, y, tick=ticks.append))
    assert sum(ticks) == 40 * len(trajectory)


@pytest.mark.parametrize("rule", ["midpoint", "gauss-legendre", "left"])
def test_rules_weigh_one_in_total(rule: str) -> None:
    for nodes in (1, 2, 7):
        assert sum(w for _, w in get_rule(rule, nodes)) == pytest.approx(1)
    assert all(0 <= t <= 1 for t, _ in get_rule(rule, 5))


def test_gauss_legendre_is_exact_for_cubics_with_two_nodes() -> None:
    assert sum(w * t**3 for t, w in get_rule("gauss-legendre", 2)) == pytest.approx(1 / 4)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean midpoint"):
        get_rule("mid-point", 1)
    with pytest.raises(UsageError, match="at least one node"):
        get_rule("midpoint", 0)


def test_batch_norm_buffers_are_part_of_the_path(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.05))
    assert not isinstance(model, TinyNet)
    x, y = tiny_data(4, torch.float64)
    from prunekit.kernel import reconstruct

    function = ModelFunction(model, trajectory.layout, trajectory.fixed)
    made = reconstruct(function, trajectory.segments(), x, y, tolerance=None, nodes=16)
    model.eval()
    torch.testing.assert_close(made.model, model(x))
    assert made.error.max() < 2e-3 * made.model.abs().max()
