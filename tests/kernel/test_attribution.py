"""Scores along the path are what the formula says, however they are chunked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import PrunekitError, Recorder, Trajectory
from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, attribute, get_rule, reconstruct, score_error, step_scores
from prunekit.kernel.attribution import chunks
from prunekit.kernel.bisection import bisect
from prunekit.trajectory import Segment
from tests.conftest import TinyNet, record, tiny_data

Run = tuple[nn.Module, Trajectory]


def whole(run: Run, x: Tensor, y: Tensor, **options: object) -> Tensor:
    model, trajectory = run
    function = ModelFunction(model, trajectory.layout, trajectory.fixed)
    parts = list(attribute(function, trajectory.segments, x, y, **options))  # type: ignore[arg-type]
    names = [e.name for e in trajectory.layout.parameters]
    found = torch.full((len(x), 4, sum(e.size for e in trajectory.layout.parameters)), float("nan"), dtype=torch.float64)
    for p in parts:
        found[p.samples, p.targets] = torch.cat([p.scores[n].flatten(2) for n in names], 2)
    assert not found.isnan().any()
    return found


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_chunks_do_not_matter(tiny_run: Run) -> None:
    x, y = tiny_data(13, torch.float64)
    at_once = whole(tiny_run, x, y)
    one = 3 * 46 * 8  # bytes of one sample's scores for one target
    for memory in (one, 3 * one, 9 * one):  # one target at a time, three, all four of two samples
        torch.testing.assert_close(at_once, whole(tiny_run, x, y, memory=memory), atol=1e-14, rtol=1e-10)
    with pytest.raises(PrunekitError, match="does not hold one sample"):
        whole(tiny_run, x, y, memory=one - 1)


def test_chunks_fit_the_memory_and_cover_everything() -> None:
    for samples, targets, memory in ((40, 10, 10**5), (3, 115, 700), (17, 1, 10**9)):
        seen = torch.zeros(samples, targets)
        for rows, columns in chunks(samples, targets, 100, memory):
            assert (rows.stop - rows.start) * (columns.stop - columns.start) * 300 <= memory
            seen[rows, columns] += 1
        assert (seen == 1).all()


def test_skipped_chunks_are_the_first(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(140, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    parts = list(attribute(function, trajectory.segments, x, y))
    rest = list(attribute(function, trajectory.segments, x, y, skip=1))
    assert [p.samples for p in rest] == [p.samples for p in parts[1:]]
    assert all(torch.equal(a.scores[k], b.scores[k]) for a, b in zip(rest, parts[1:], strict=True) for k in a.scores)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_a_tolerance_bounds_every_intervals_sum(tmp_path: Path, tolerance: float) -> None:
    torch.manual_seed(0)
    model = TinyNet(torch.relu).double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))
    x, y = tiny_data(10, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    for segment in trajectory.segments():
        parts = list(attribute(function, lambda s=segment: [s], x, y, tolerance=tolerance, share="whole"))  # type: ignore[misc]
        total = torch.cat([sum(v.flatten(2).sum(2) for v in p.scores.values()) for p in parts])
        begin, end = function(segment.start, x, y), function(segment.end, x, y)
        intervals = torch.zeros(len(x))
        for piece in bisect(function, segment.start, segment.end, x, y, begin, end, tolerance):
            intervals[piece.who] += 1
        assert ((total - (end - begin)).abs().amax(1) <= tolerance * intervals + 1e-12).all()


def test_early_steps_take_their_own_nodes(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(6, torch.float64)
    function = ModelFunction(model, trajectory.layout)

    def total(begin: int, end: int | None, **options: Any) -> dict[str, torch.Tensor]:
        return next(attribute(function, lambda: trajectory.segments(begin=begin, end=end), x, y, **options)).scores

    found, first, rest = total(0, None, early=(3, 5), nodes=2), total(0, 3, nodes=5), total(3, None, nodes=2)
    for name, scores in found.items():
        torch.testing.assert_close(scores, first[name] + rest[name])


def test_nodes_are_taken_where_they_are_needed(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(10, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    coarse, fine = (reconstruct(function, trajectory.segments(), x, y, tolerance=t) for t in (1e-1, 1e-5))
    assert coarse.evaluations == 10 * len(trajectory)
    assert coarse.evaluations < fine.evaluations
    assert fine.error.max() < coarse.error.max()


def test_survival_by_running_decay_forwards(tmp_path: Path) -> None:
    """ω_s: move a weight at step s by a unit and see what decay leaves of it at the end, the data's moves held fixed."""
    for name, cls, options in (
        ("adamw", torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.5}),
        ("sgd", torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8}),
        ("nesterov", torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "nesterov": True}),
        ("dampening", torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "dampening": 0.4}),
        ("adam", torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.3}),
    ):
        torch.manual_seed(0)
        model = TinyNet().double()
        optimizer = cls(model.parameters(), **options)
        x, y = tiny_data(24, torch.float64)
        with Recorder(tmp_path / name, model, optimizer, second_moments=name == "adam") as recorder:
            for step in range(7):
                indices = torch.arange(step, step + 8) % 24
                optimizer.zero_grad()
                F.cross_entropy(model(x[indices]), y[indices]).backward()
                recorder.batch(indices)
                optimizer.step()
        trajectory = Trajectory(tmp_path / name)
        plain = list(trajectory.segments())
        for segment in trajectory.segments(survival=True):
            s = segment.index

            def end(nudged: int, by: Tensor, pieces: list[Segment] = plain, path: Trajectory = trajectory) -> Tensor:
                theta, running = path.state(0).clone(), torch.zeros(path.layout.total, dtype=torch.float64)
                for piece in pieces:
                    share = torch.zeros_like(theta)
                    path.recursion.regularisation(piece.index, theta, path.second_moments(piece.index), running, share)
                    theta = theta + share + piece.data_update + (by if piece.index == nudged else 0)
                return theta

            unit = torch.ones(trajectory.layout.total, dtype=torch.float64)
            left = end(s, unit) - end(s, 0 * unit)
            assert segment.surviving is not None
            torch.testing.assert_close(segment.surviving, left * segment.data_update, atol=1e-12, rtol=1e-9)
        total = trajectory.surviving_start() + sum(s.surviving for s in trajectory.segments(survival=True))
        torch.testing.assert_close(total, trajectory.state(-1), atol=1e-12, rtol=1e-9)


@pytest.mark.slow
def test_step_scores_sum_to_the_change(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(5, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    kernel, regularisation, both = (
        step_scores(function, trajectory.segments(), x, y, share=s, nodes=8) for s in ("kernel", "regularisation", "whole")
    )
    assert kernel.shape == (12, 5, 4)
    torch.testing.assert_close(kernel + regularisation, both)
    change = function(trajectory.state(-1), x, y) - function(trajectory.state(0), x, y)
    torch.testing.assert_close(both.sum(0), change, atol=1e-3 * float(change.abs().max()), rtol=0)
    parameterwise = whole(tiny_run, x, y, nodes=8).sum(2)
    torch.testing.assert_close(kernel.sum(0), parameterwise, atol=1e-12, rtol=1e-9)


@pytest.mark.slow
def test_error_estimates_shrink_with_nodes(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(20, torch.float64)
    function = ModelFunction(model, trajectory.layout)
    found = [score_error(function, trajectory.segments, x, y, nodes=n, rule="midpoint") for n in (1, 4, 16)]
    assert found[0]["relative"] > 4 * found[1]["relative"] > 16 * found[2]["relative"] > 0
    assert found[0]["pieces"] == 8
    exact = [score_error(function, trajectory.segments, x, y, nodes=n, rule="midpoint", pieces=99, samples=99) for n in (1,)]
    one, converged = (whole(tiny_run, x, y, nodes=n).abs().sum((0, 1)) for n in (1, 64))
    true = float((one - converged).abs().sum() / converged.sum())
    assert 0.5 * true < exact[0]["relative"] < 1.5 * true


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
    function = ModelFunction(model, trajectory.layout, trajectory.fixed)
    made = reconstruct(function, trajectory.segments(), x, y, tolerance=None, nodes=16)
    model.eval()
    torch.testing.assert_close(made.model, model(x))
    assert made.error.max() < 2e-3 * made.model.abs().max()
