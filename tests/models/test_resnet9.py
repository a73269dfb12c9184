"""ResNet-9 against the same layers put together from torch's own modules, and what the kernel asks of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.kernel import ModelFunction
from prunekit.kernel.gradients import VmapGradients, choose_engine
from prunekit.models import resnet9
from prunekit.structure import find_groups
from prunekit.trajectory import Layout


class Plus(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def conv(channels_in: int, channels_out: int, size: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, size, stride, padding, bias=False), nn.ReLU())


def assembled(w: int, classes: int) -> nn.Module:
    return nn.Sequential(
        conv(3, w), conv(w, 2 * w, 5, 2, 2), Plus(nn.Sequential(conv(2 * w, 2 * w), conv(2 * w, 2 * w))),
        conv(2 * w, 4 * w), nn.MaxPool2d(2), Plus(nn.Sequential(conv(4 * w, 4 * w), conv(4 * w, 4 * w))),
        conv(4 * w, 2 * w, padding=0), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2 * w, classes, bias=False),
    )  # fmt: skip


def test_it_is_these_layers_in_this_order() -> None:
    torch.manual_seed(0)
    ours, other = resnet9(3, 4).double(), assembled(3, 4).double()
    state = zip(other.state_dict(), ours.state_dict().values(), strict=True)
    other.load_state_dict(dict(state))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), other(x), atol=1e-12, rtol=1e-12)


def test_size_that_the_docstring_gives() -> None:
    count = sum(p.numel() for p in resnet9().parameters())
    assert count == 2_271_168
    assert f"{count:,} parameters" in str(resnet9.__doc__)


def test_layerwise_gradients_and_forward_mode_agree_with_the_general_way() -> None:
    torch.manual_seed(0)
    model = resnet9(2, 2).double()
    layout = Layout.of(model)
    function = ModelFunction(model, layout)
    theta = layout.flatten(model.state_dict())
    direction = torch.randn_like(theta)
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    engine = choose_engine(function, theta, x, y)
    assert not isinstance(engine, VmapGradients)
    total = {e.name: theta.new_zeros(3, 2, *e.shape) for e in layout.parameters}
    engine.accumulate(theta, x, y, layout.views(direction), total)
    along = sum(score.flatten(2).sum(-1) for score in total.values())
    torch.testing.assert_close(along, function.directional(theta, direction, x, y)[1], atol=1e-10, rtol=1e-8)


def test_channels_that_a_residual_adds_go_with_its_input_s() -> None:
    groups = find_groups("channels", resnet9(2, 2), torch.randn(2, 3, 32, 32))
    together = [group.members.keys() for group in groups if "conv2.weight@0" in group.members]
    assert len(together) == 1
    assert {"residual1.conv2.weight@0", "residual1.conv1.weight@1", "conv3.weight@1"} <= together[0]
