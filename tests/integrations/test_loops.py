"""Recorded, masked and gone on with, in every library's loop: the same weights, exact masks, a whole path."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import OnlineInfluence, Planner, Trajectory, UsageError, make_plan, score
from prunekit.errors import ArtifactError, Note
from prunekit.integrations import Gradual, Recording
from prunekit.kernel import ModelFunction, reconstruct
from prunekit.trajectory.bare import named_tensors
from tests.integrations.loops import BATCH, COUNT, LOOPS, Samples, Tiny, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
Loop = Callable[..., nn.Module]


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed: pip install 'prunekit[hf,lightning]'")
    return LOOPS[request.param]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def a_plan(loop: Loop) -> Any:
    model: nn.Module = tiny()
    if loop is LOOPS["lightning"]:
        model = nn.ModuleDict({"net": model})  # as it lies in the LightningModule
    return make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip": 0.3}], ids=["plain", "accumulated, clipped"])
def test_recording_changes_nothing_and_is_whole(tmp_path: Path, loop: Loop, options: dict[str, Any]) -> None:
    plain = weights(loop(tmp_path / "plain", None, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        model = loop(tmp_path / "recorded", Recording(tmp_path / "t", second_moments=True), **options)
    assert same(weights(model), plain)
    path = Trajectory(tmp_path / "t")
    each = math.ceil(COUNT / BATCH / options.get("accumulate", 1))
    assert path.complete
    assert len(path) == 2 * each
    last = path.model_state()
    for name, tensor in model.state_dict().items():
        assert torch.equal(next(v for k, v in last.items() if k.removeprefix("net.") == name), tensor), name
    for epoch in range(2):  # every sample once an epoch, in batches as they were trained on
        seen = [list(b) for s in range(epoch * each, (epoch + 1) * each) for b in path.step(s).batches or ()]
        assert sorted(k for b in seen for k in b) == list(range(COUNT))
        assert all(len(b) == BATCH for b in seen)
    if options:
        assert any(path.step(s).gradient_scale < 1 for s in range(len(path)))


def test_first_update_is_of_the_noted_samples(tmp_path: Path, loop: Loop) -> None:
    """The gradient of the noted samples, accumulated and clipped as noted, is what Adam's buffers hold after the step."""
    options = {"accumulate": 2, "clip": 0.3, "epochs": 1}
    loop(tmp_path / "out", Recording(tmp_path / "t", second_moments=True), **options)
    path, data = Trajectory(tmp_path / "t"), Samples()
    step, model = path.step(0), tiny()
    loss = torch.zeros(())
    for samples, weight in zip(step.batches or (), step.weights, strict=True):
        loss = loss + weight * F.cross_entropy(model(data.x[list(samples)]), data.y[list(samples)])
    loss.backward()
    moments = path.second_moments(0)
    assert moments is not None
    named = dict(model.named_parameters())
    for entry in path.layout.parameters:
        gradient = named[entry.name.removeprefix("net.")].grad
        assert gradient is not None
        expected = (step.gradient_scale * gradient).square() * 0.001  # Adam's v with beta 0.999
        torch.testing.assert_close(moments[entry.span].view_as(expected), expected, rtol=2e-3, atol=1e-12)


def test_masks_are_exact_at_every_step(tmp_path: Path, loop: Loop) -> None:
    plan, seen = a_plan(loop), []

    def watch(model: nn.Module, step: int) -> None:
        named = named_tensors(model)
        seen.append(all(not named[n.removeprefix("net.")].detach()[~m].any() for n, m in plan.masks().items()))

    model = loop(tmp_path / "out", Recording(tmp_path / "t", plan=plan), accumulate=2, watch=watch)
    watch(model, -1)
    assert len(seen) > 8
    assert all(seen)
    path = Trajectory(tmp_path / "t")
    for index in range(len(path) + 1):
        state = path.layout.views(path.state(index))
        assert all(not state[name][~mask].any() for name, mask in plan.masks().items())


def test_path_is_complete(tmp_path: Path, loop: Loop) -> None:
    """f(θ_0) + Σ of all steps = f(θ_N), with a mask held."""
    model = loop(tmp_path / "out", Recording(tmp_path / "t", plan=a_plan(loop)), accumulate=2, clip=0.3)
    path = Trajectory(tmp_path / "t")
    x = Samples().x[:5]
    for at, expected in ((-1, model.eval()(x)),):
        end = tiny().eval()
        end.load_state_dict({k.removeprefix("net."): v for k, v in path.model_state(at).items()})
        assert torch.equal(end(x), expected)
    inside = nn.ModuleDict({"net": tiny()}) if loop is LOOPS["lightning"] else tiny()
    found = reconstructed(path, _Called(inside) if loop is LOOPS["lightning"] else inside, x)
    torch.testing.assert_close(found.double(), model.eval()(x).double(), rtol=1e-3, atol=1e-3)
