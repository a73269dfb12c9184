"""What goes into a Linear or convolution layer, and its second moments: ``H = Σ x xᵀ`` over samples and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import PrunekitError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Moments:
    """Of one layer: ``gram`` is ``(groups, d, d)``, float64, ``d`` the inputs of one output.

    A weight of the layer, flattened to ``(groups, outputs / groups, d)``, meets the inputs of its group.
    """

    gram: Tensor

    def rows_of(self, weight: Tensor) -> Tensor:
        """``(groups, outputs / groups, d)`` of a weight, float64."""
        return weight.double().reshape(len(self.gram), -1, self.gram.shape[1])


def layers_of(model: nn.Module, parameters: Sequence[str], what: str) -> dict[str, Layer]:
    """The layers that hold ``parameters``.

    Raises:
        PrunekitError: one is not the weight of a Linear, Conv1d or Conv2d; names it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Layer] = {}
    for parameter in parameters:
        name, _, kind = parameter.rpartition(".")
        module = modules.get(name)
        if kind != "weight" or not isinstance(module, LAYERS) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
            said = f"is of a {type(module).__name__}" if module is not None else "has no layer"
            raise PrunekitError(
                f"{what} looks at the inputs of Linear and convolution weights, {parameter} {said}; leave it out "
                f"(prunable.ignore: ['{parameter}'])"
            )
        found[parameter] = module
    return found


@contextmanager
def watching(layers: Mapping[str, Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While inside, every forward pass of a layer calls ``see(parameter name, inputs)``.

    Inputs come as they meet the weight, ``(groups, rows, d)``, float64: a row a sample and position.
    """
    hooks = []
    for name, layer in layers.items():

        def before(module: nn.Module, inputs: tuple[Any, ...], name: str = name, layer: Layer = layer) -> None:
            see(name, _columns(layer, inputs[0].detach()).double())

        hooks.append(layer.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def collecting(layers: Mapping[str, Layer]) -> Iterator[dict[str, Moments]]:
    """While inside, every forward pass adds its layers' inputs; parameter name -> moments."""
    moments: dict[str, Moments] = {}

    def add(name: str, inputs: Tensor) -> None:
        gram = inputs.transpose(1, 2) @ inputs
        moments[name] = Moments(moments[name].gram + gram if name in moments else gram)

    with watching(layers, add):
        yield moments


def _columns(layer: Layer, x: Tensor) -> Tensor:
    """Inputs as they meet the weight, ``(groups, rows, d)``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    if x.dim() == layer.weight.dim() - 1:
        x = x[None]  # without a batch axis
    sides = layer._reversed_padding_repeated_twice
    x = F.pad(x, sides) if layer.padding_mode == "zeros" else F.pad(x, sides, mode=layer.padding_mode)
    kernel, stride, dilation = (
        (1,) * (2 - len(size)) + tuple(size) for size in (layer.kernel_size, layer.stride, layer.dilation)
    )
    if x.dim() == 3:
        x = x[:, :, None]
    patches: Tensor = F.unfold(x, kernel, dilation, 0, stride)  # (samples, channels × kernel, positions), channel by channel
    columns: Tensor = patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return columns


def check_seen(moments: Mapping[str, Moments], parameters: Iterable[str], what: str) -> None:
    """Raises PrunekitError for a layer whose own forward was never called."""
    for name in parameters:
        if name not in moments:
            raise PrunekitError(f"{what}: no input reached the layer of {name}; leave it out (prunable.ignore: ['{name}'])")
