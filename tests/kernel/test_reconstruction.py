"""The path gives the model back, says how well, and keeps its word."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from prunekit import Trajectory
from prunekit.kernel import ModelFunction, bisection, masked_machine, reconstruct, shares_by_layer
from prunekit.kernel.bisection import DEPTH, bisect
from prunekit.trajectory import Layout, Segment
from tests.conftest import TinyNet, record, tiny_data

Run = tuple[nn.Module, Trajectory]


def test_completeness_shrinks_with_nodes(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(10, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    errors = []
    for nodes in (1, 2, 4, 8):
        made = reconstruct(function, trajectory.segments(), x, y, tolerance=None, nodes=nodes)
        torch.testing.assert_close(made.model, model.eval()(x))
        errors.append(float(made.error.max()))
    assert errors[0] < 1e-2
    for coarse, fine in pairwise(errors):
        assert fine < coarse / 3


@pytest.mark.slow
def test_kinked_activations_too(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = TinyNet(torch.relu).double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))  # type: ignore[operator]
    x, y = tiny_data(10, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    coarse, fine = (reconstruct(function, trajectory.segments(), x, y, tolerance=None, nodes=n).error.mean() for n in (1, 64))
    assert fine < coarse / 10


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_every_interval_of_bisection_holds_the_tolerance(tmp_path: object, tolerance: float) -> None:
    torch.manual_seed(0)
    model = TinyNet(torch.relu).double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))  # type: ignore[operator]
    x, y = tiny_data(10, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    deepest = 2.0**-DEPTH  # there the interval with the kink is taken as it is
    for segment in trajectory.segments():
        start, end = segment.start, segment.end
        begin, finish = function(start, x, y), function(end, x, y)
        covered, allowed = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
        for piece in bisect(function, start, end, x, y, begin, finish, tolerance):
            covered[piece.who] += piece.weight
            largest = (
                piece.slope.abs().amax(1) * piece.weight if piece.weight <= deepest else torch.zeros(len(piece.who)).double()
            )
            allowed[piece.who] += tolerance + 10 * largest
        torch.testing.assert_close(covered, torch.ones_like(covered))
        made = reconstruct(function, [segment], x, y, tolerance=tolerance)
        assert (made.error.amax(1) <= allowed).all()


def test_every_directional_derivative_is_counted(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = TinyNet(torch.relu).double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))  # type: ignore[operator]
    x, y = tiny_data(10, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    inner, counted = function.directional, []

    def directional(theta: Tensor, direction: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        counted.append(len(x))
        return inner(theta, direction, x, y)

    function.directional = directional  # type: ignore[method-assign]
    for options in ({"tolerance": 1e-4}, {"tolerance": None, "nodes": 3}):
        counted.clear()
        made = reconstruct(function, trajectory.segments(), x, y, **options)  # type: ignore[arg-type]
        assert made.evaluations == sum(counted)


def test_the_certificate_bounds_the_error(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(10, torch.float64)
    made = reconstruct(ModelFunction(model, trajectory.layout), trajectory.segments(), x, y, tolerance=None)
    assert made.residuals.shape == (len(trajectory),)
    assert made.error.mean() <= made.residuals.sum()
    assert made.evaluations == 10 * len(trajectory)


def test_everything_kept_is_the_reconstruction(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(5, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    made = reconstruct(function, trajectory.segments(), x, y, tolerance=None, nodes=2)
    kept = masked_machine(function, trajectory.segments(), torch.ones(trajectory.layout.total).double(), x, y, nodes=2)
    torch.testing.assert_close(kept.double(), made.rebuilt, atol=1e-5, rtol=1e-5)
    nothing = masked_machine(function, trajectory.segments(), torch.zeros(trajectory.layout.total).double(), x, y)
    torch.testing.assert_close(nothing.double(), made.start, atol=1e-5, rtol=1e-5)


def test_layer_shares_sum_to_the_change(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(5, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    start = trajectory.state(-1)
    end = start.clone()
    end[::3] = 0
    shares = shares_by_layer(function, Segment(0, start, end, torch.zeros_like(start)), x, y, nodes=64)
    assert set(shares) == {"conv", "head"}
    change = function(end, x, y) - function(start, x, y)
    torch.testing.assert_close(sum(shares.values()), change, atol=1e-3 * float(change.abs().max()), rtol=0)


def test_unmoved_layers_have_no_share(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(2, torch.float64)
    start = trajectory.state(-1)
    end = start.clone()
    end[trajectory.layout.entries[0].span] = 0
    function = ModelFunction(model, trajectory.layout)
    assert set(shares_by_layer(function, Segment(0, start, end, torch.zeros_like(start)), x, y)) == {"conv"}


@pytest.mark.slow
def test_shares_by_layer_are_the_same_for_few_samples_as_among_many() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(*[m for _ in range(9) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())]).double().eval()
    layout = Layout.of(deep)
    theta = layout.flatten({**dict(deep.named_parameters()), **dict(deep.named_buffers())}).detach()
    pruned = theta * (torch.rand_like(theta) < 0.7)
    for name in ("3.weight", "3.bias"):  # a layer that does not move
        layout.views(pruned)[name].copy_(layout.views(theta)[name])
    function, segment = ModelFunction(deep, layout), Segment(0, theta, pruned, torch.zeros_like(theta))
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.zeros(12, dtype=torch.int64)
    many = shares_by_layer(function, segment, x, y, nodes=4)  # 48 numbers, 18 layers: forward mode
    few = shares_by_layer(function, segment, x[:2], y[:2], nodes=4)  # 8 numbers: a backward pass each
    assert list(few) == list(many)
    assert "3" not in few
    for layer, share in few.items():
        torch.testing.assert_close(share, many[layer][:2], atol=1e-12, rtol=1e-9)


def test_what_rounding_hides_is_not_halved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of a model that diverged are so large that no halving brings their error below a usual tolerance."""
    torch.manual_seed(0)
    model = TinyNet(torch.relu)
    x, y = tiny_data(10, torch.float32)
    function = ModelFunction(model, Layout.of(model))
    start = Layout.of(model).state(model)
    step = Segment(0, start, start + 1e4 * torch.randn(len(start)), torch.zeros_like(start))
    few = reconstruct(function, [step], x, y, tolerance=1e-3)
    monkeypatch.setattr(bisection, "ROUNDING", 0)
    many = reconstruct(function, [step], x, y, tolerance=1e-3)
    assert few.evaluations < many.evaluations / 4
    assert few.error.max() < 2e-3 * few.model.abs().max()
