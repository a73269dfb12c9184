"""Running statistics are coordinates of the path, whatever layer or function normalises by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.kernel import ModelFunction
from prunekit.trajectory import Layout, Trajectory
from tests.conftest import record


class Activating(nn.BatchNorm2d):
    """Normalises and activates in one layer, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ByFunction(nn.Module):
    """No layer of torch's, only its function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, self.training, 0.3)


def instance(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True, momentum=0.3)


def trained(folder: Path, norm: type[nn.Module]) -> tuple[nn.Module, Trajectory, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(16, 1, 4, 4) * 2 + 1, torch.arange(16) % 3
    trajectory = record(folder, model, torch.optim.SGD(model.parameters(), 0.2), data=(x, y))
    return model.eval(), trajectory, x, y


NORMS = [nn.BatchNorm2d, Activating, ByFunction, instance]


@pytest.mark.parametrize("norm", NORMS)
def test_a_function_of_weights_is_the_model(tmp_path: Path, norm: type[nn.Module]) -> None:
    model, trajectory, x, y = trained(tmp_path, norm)
    function = ModelFunction(model, trajectory.layout, trajectory.fixed)
    for _ in range(2):  # the first run is watched
        torch.testing.assert_close(function(trajectory.state(-1), x, y), model(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_statistics_have_derivatives(tmp_path: Path, norm: type[nn.Module], mode: str) -> None:
    model, trajectory, x, y = trained(tmp_path, norm)
    function = ModelFunction(model.double(), trajectory.layout, trajectory.fixed)
    theta = trajectory.state(-1).double()
    direction = torch.zeros_like(theta)
    spans = [entry.span for entry in trajectory.layout if entry.kind == "buffer"]
    assert spans
    for span in spans:
        direction[span] = torch.randn(len(direction[span]), dtype=theta.dtype) * 0.1
    x, step = x.double(), 1e-5
    expected = (function(theta + step * direction, x, y) - function(theta - step * direction, x, y)) / (2 * step)
    assert float(expected.abs().max()) > 1e-3
    if mode == "forward":
        found = function.directional(theta, direction, x, y)[1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    else:
        weights = torch.randn_like(expected)
        gradient = function.gradient(theta, x, y, weights)[1]
        torch.testing.assert_close(gradient @ direction, (weights * expected).sum(), rtol=1e-5, atol=1e-8)


def test_one_sample_with_a_transposed_gradient() -> None:
    """Where torch's own derivative is wrong (see ``prunekit.kernel.statistics``)."""
    norm = nn.BatchNorm2d(3).double().eval()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(norm, nn.Flatten(2), _Transposed(), nn.Flatten())
    x, weights = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(1, 48, dtype=torch.float64)
    layout = Layout.of(model)
    function = ModelFunction(model, layout)
    theta = layout.flatten(dict(model.state_dict()))
    found = layout.views(function.gradient(theta, x, torch.zeros(1, dtype=torch.int64), weights)[1])["0.weight"]
    normal = (x / (norm.running_var + norm.eps).sqrt().view(1, 3, 1, 1)).flatten(2)
    torch.testing.assert_close(found, (normal * weights.view(1, 16, 3).transpose(1, 2)).sum((0, 2)))


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
