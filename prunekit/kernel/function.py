"""The model as a function of its weights: ``f(x; θ)`` with θ one flat vector."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunekit.kernel.targets import Target, get_target
from prunekit.trajectory.layout import Layout


class ModelFunction:
    """A private copy of ``model``, called with any state of the layout.

    Args:
        model: its own weights do not matter, except the parts outside ``layout`` and ``fixed``.
        layout: the path's coordinates.
        fixed: tensors beside the path (frozen parameters, integer buffers) by name.
        target: a name from ``TARGETS`` or a function ``(outputs, labels) -> (samples, targets)``.
        device: where to compute.
        training: run it as in training (dropout, a batch's own statistics) instead of evaluation mode.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        fixed: Mapping[str, Tensor] | None = None,
        target: str | Target = "outputs",
        device: torch.device | str = "cpu",
        training: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = copy.deepcopy(model).train(training).requires_grad_(False).to(self.device)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                if training:
                    module.__dict__.pop("forward", None)
                    module.track_running_stats = False  # the batch's statistics, and none updated: states are read only
                else:
                    module.forward = MethodType(_normalise, module)  # type: ignore[method-assign]
        if fixed:
            self.model.load_state_dict(dict(fixed), strict=False)
        self.layout, self.target = layout, get_target(target)

    def narrowed(self, targets: slice) -> ModelFunction:
        """The same function with some of its targets only; the model is shared."""
        other, whole = copy.copy(self), self.target
        other.target = lambda out, labels: whole(out, labels)[:, targets]
        return other

    def __call__(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Target values ``(samples, targets)`` at the flat state ``theta`` ``(P,)``."""
        return self.named(self.layout.views(theta), x, y)

    def named(self, state: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The same, from tensors by name."""
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has neither forward mode nor per-sample gradients
            return self.target(functional_call(self.model, dict(state), (x,)), y)

    @torch.no_grad()
    def directional(self, theta: Tensor, direction: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Values and derivative along ``direction`` ``(P,)``, both ``(samples, targets)``: forward mode, no Jacobian."""
        views = self.layout.views
        found = jvp(lambda state: self.named(state, x, y), (views(theta),), (views(direction),))
        return found[0], found[1]


def _normalise(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm in evaluation mode, differentiable in its running statistics, which torch's own is not.

    They are coordinates of the path: a step moves them, and the outputs with them.
    """
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, variance = module.running_mean, module.running_var
    assert mean is not None
    assert variance is not None
    out = (x - mean.view(shape)) * (variance + module.eps).rsqrt().view(shape)
    return out if module.weight is None else out * module.weight.view(shape) + module.bias.view(shape)
