"""Per-sample gradients from layer inputs and output gradients: one forward, one backward, one product a layer.

The backward pass stops at the layers' outputs, so no batch-summed weight gradient is ever formed; a layer then
gives all samples' weight gradients as one batched matrix product (benchmarks/README.md: what that gains).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.batch import Inputs, Labels, size
from prunekit.kernel.function import ModelFunction
from prunekit.trajectory.derived import derived_weights

BLOCK = 2**20  # bytes of a layer's gradients held at a time: they are added while still in the processor's cache


class LayerwiseGradients:
    """Gradients of models whose parameters belong to layers in ``LAYER_RULES`` or have an axis of 1 where samples go.

    It does not notice a weight that is used elsewhere too, or samples on another axis: ``choose_engine`` does.

    Attributes:
        covers_all: whether that is so for all trained parameters.
    """

    def __init__(self, function: ModelFunction) -> None:
        self.function = function
        names = {id(p): name for name, p in function.model.named_parameters()}
        trained = {entry.name for entry in function.layout.parameters}
        self._parts: dict[nn.Module, dict[str, str]] = {}
        hooked = {one.module for one in derived_weights(function.model)}  # their weight is no parameter, but computed from some
        for module in function.model.modules():
            parts = {short: names[id(p)] for short, p in module.named_parameters(recurse=False) if names[id(p)] in trained}
            if rule_of(module) is not None and parts and module not in hooked:
                self._parts[module] = parts
        in_layers = {name for parts in self._parts.values() for name in parts.values()}
        self._bare = [e.name for e in function.layout.parameters if e.name not in in_layers and e.shape[:1] == (1,)]
        self.covers_all = in_layers.union(self._bare) >= trained
        self._shared: dict[nn.Module, bool] = {}

    def accumulate(self, theta: Tensor, x: Inputs, y: Labels, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for name, gradient in self._gradients(theta, x, y, set(into)):
            gradient.add(into[name], scale[name])

    def squares(self, theta: Tensor, x: Inputs, y: Labels) -> dict[str, Tensor]:
        found: dict[str, list[Product | Rows | Whole]] = {}
        for name, gradient in self._gradients(theta, x, y, {e.name for e in self.function.layout.parameters}):
            found.setdefault(name, []).append(gradient)
        total = {e.name: theta.new_zeros(e.shape) for e in self.function.layout.parameters}
        one = theta.new_ones(())
        for name, gradients in found.items():
            if len(gradients) == 1:
                gradients[0].add_squares(total[name])
                continue
            samples = size(x)  # a layer called more than once: its gradients add up before they are squared
            whole = theta.new_zeros(samples, gradients[0].targets(total[name].shape), *total[name].shape)
            for gradient in gradients:
                gradient.add(whole, one.expand(total[name].shape))
            total[name].add_(whole.square_().sum((0, 1)))
        return total

    def _gradients(self, theta: Tensor, x: Inputs, y: Labels, wanted: set[str]) -> Iterator[tuple[str, Product | Rows | Whole]]:
        """One for every call of a layer; nothing is multiplied out yet."""
        calls: list[tuple[nn.Module, Tensor, Any]] = []
        samples = size(x)

        def note(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor | None:
            a = (given[0] if given else next(iter(named.values()))).detach()
            if type(layer) is nn.Embedding and self._shared.setdefault(layer, a.shape[0] != samples):
                a, output = _per_sample(a, samples), _per_sample(output, samples)  # positions, the same for all samples
            leaf = not output.requires_grad
            if leaf:  # the first layers: nothing before them needs a gradient, the graph begins here
                output = output.detach().requires_grad_()
            keep = kept_of(layer)
            calls.append((layer, a if keep is None else keep(layer, a), torch.autograd.graph.get_gradient_edge(output)))
            return output.clone() if leaf else None  # an in-place activation may not touch a leaf

        state = self.function.layout.views(theta)
        bare = {name: _per_sample(state[name], samples).detach().requires_grad_() for name in self._bare if name in wanted}
        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in self._parts]
        try:
            with torch.enable_grad():
                values = self.function.named({**state, **bare}, x, y)
        finally:
            for hook in hooks:
                hook.remove()
        deltas = _backward(values, [*(edge for _, _, edge in calls), *bare.values()])
        for (layer, a, _), delta in zip(calls, deltas, strict=False):
            if delta is None:
                continue
            if len(a) != samples:  # positions folded into the first axis
                a, delta = a.unflatten(0, (samples, -1)), delta.unflatten(0, (samples, -1)).transpose(1, 2)
            rule = rule_of(layer)
            assert rule is not None
            gradients = rule(layer, a, delta)
            for short, name in self._parts[layer].items():
                if name in wanted:
                    yield name, gradients[short]
        for name, delta in zip(bare, deltas[len(calls) :], strict=True):
            if delta is not None:
                yield name, Whole(delta.reshape(samples, values.shape[1], *state[name].shape))


def _per_sample(shared: Tensor, samples: int) -> Tensor:
    """A view with a sample axis in front, in the place of an axis of 1: each sample gets a gradient of its own."""
    if shared.shape[0] != 1:
        shared = shared[None]
    return shared.expand(samples, *shared.shape[1:])


def _backward(values: Tensor, edges: list[Any]) -> list[Tensor | None]:
    """Gradients of ``values`` ``(samples, targets)`` with respect to ``edges``, each ``(samples, targets, ...)``."""
    n, targets = values.shape
    if targets == 1:  # a plain backward pass: vmap costs more than it batches
        found = torch.autograd.grad(values, edges, torch.ones_like(values), allow_unused=True)
        return [None if delta is None else delta[:, None] for delta in found]
    one_hot = torch.eye(targets, dtype=values.dtype, device=values.device)[:, None].expand(targets, n, targets)
    found = torch.autograd.grad(values, edges, one_hot, is_grads_batched=True, allow_unused=True)
    return [None if delta is None else delta.transpose(0, 1) for delta in found]


@dataclass(frozen=True)
class Product:
    """Gradients ``left @ right``: ``(samples, targets × rows, positions)`` times ``(samples, positions, columns)``.

    With ``pick`` ``(positions, columns)``, ``right`` is ``(samples, any)`` and its elements ``pick`` are meant.
    """

    left: Tensor
    right: Tensor
    pick: Tensor | None = None

    def add(self, total: Tensor, scale: Tensor) -> None:
        n = len(total)
        rows, positions, columns = *self.left.shape[1:], (self.right if self.pick is None else self.pick).shape[-1]
        picked = 0 if self.pick is None else positions * columns
        block = n if total.is_cuda else min(n, BLOCK // (max(rows * columns, picked) * total.element_size()))
        block = max(1, block)
        gradients, patches = total.new_empty(block, rows, columns), total.new_empty(block, picked)
        for i in range(0, n, block):
            left, right, part = self.left[i : i + block], self.right[i : i + block], total[i : i + block]
            if self.pick is not None:
                right = torch.index_select(right, 1, self.pick.view(-1), out=patches[: len(left)]).view(-1, positions, columns)
            multiply = torch.mul if positions == 1 else torch.bmm
            part.addcmul_(multiply(left, right, out=gradients[: len(left)]).view_as(part), scale)

    def targets(self, shape: tuple[int, ...]) -> int:
        return self.left.shape[1] // shape[0]

    def add_squares(self, total: Tensor) -> None:
        n, rows, positions = self.left.shape
        flat = total.view(total.shape[0], -1)
        if positions == 1 and self.pick is None:  # (left rightᵀ)² = left² (right²)ᵀ, so no sample's gradient is formed
            found = self.left[:, :, 0].square().t() @ self.right[:, 0].square()
            flat.add_(found.view(-1, *flat.shape).sum(0))
            return
        columns = flat.shape[1]
        picked = 0 if self.pick is None else positions * columns
        block = max(1, min(n, BLOCK // (max(rows * columns, picked) * total.element_size())))
        for i in range(0, n, block):
            right = self.right[i : i + block]
            if self.pick is not None:
                right = torch.index_select(right, 1, self.pick.view(-1)).view(-1, positions, columns)
            found = torch.bmm(self.left[i : i + block], right).square_().sum(0)
            flat.add_(found.view(-1, *flat.shape).sum(0))


@dataclass(frozen=True)
class Rows:
    """Gradients of a table's rows: ``index`` ``(samples, positions)``, ``values`` ``(samples, targets, positions, columns)``."""

    index: Tensor
    values: Tensor

    def add(self, total: Tensor, scale: Tensor) -> None:
        n, targets, rows, columns = total.shape
        values = self.values * scale[self.index][:, None]
        if not total.is_contiguous():  # a part of a wider tensor has no flat view
            sample, target = torch.arange(n, device=total.device), torch.arange(targets, device=total.device)
            where = (sample[:, None, None], target[None, :, None], self.index[:, None])
            total.index_put_(where, values, accumulate=True)
            return
        first = torch.arange(n * targets, device=total.device).view(n, targets, 1) * rows
        total.view(-1, columns).index_add_(0, (first + self.index[:, None]).flatten(), values.reshape(-1, columns))

    def targets(self, shape: tuple[int, ...]) -> int:
        return self.values.shape[1]

    def add_squares(self, total: Tensor) -> None:
        n, targets = self.values.shape[:2]
        block = max(1, min(n, BLOCK // (targets * total.numel() * total.element_size())))
        one = total.new_ones(()).expand(total.shape)
        for i in range(0, n, block):
            index, values = self.index[i : i + block], self.values[i : i + block]
            whole = total.new_zeros(len(index), targets, *total.shape)
            Rows(index, values).add(whole, one)
            total.add_(whole.square_().sum((0, 1)))


@dataclass(frozen=True)
class Whole:
    """Gradients ``(samples, targets, *shape)`` as they are: small ones."""

    values: Tensor

    def add(self, total: Tensor, scale: Tensor) -> None:
        total.addcmul_(self.values, scale)

    def targets(self, shape: tuple[int, ...]) -> int:
        return self.values.shape[1]

    def add_squares(self, total: Tensor) -> None:
        total.add_(self.values.square().sum((0, 1)))


Gradients = dict[str, Product | Rows | Whole]
Rule = Callable[[Any, Tensor, Tensor], Gradients]
"""``(layer, what is kept of its input, output gradient (samples, targets, ...)) -> gradients`` by short name."""


def _linear(layer: Any, a: Tensor, delta: Tensor) -> Gradients:
    n, targets = delta.shape[:2]
    a = a.reshape(n, -1, a.shape[-1])  # (samples, positions, in)
    delta = delta.reshape(n, targets, -1, delta.shape[-1])  # (samples, targets, positions, out)
    left = delta.transpose(2, 3).reshape(n, -1, delta.shape[2])
    weight = Product(left, a)
    return {"weight": weight} if layer.bias is None else {"weight": weight, "bias": Whole(delta.sum(2))}


def _convolution(layer: Any, a: Tensor, delta: Tensor) -> Gradients:
    n, targets, out = delta.shape[:3]
    delta = delta.flatten(3)  # (samples, targets, out, positions)
    bias: Gradients = {} if layer.bias is None else {"bias": Whole(delta.sum(3))}
    pads: list[int] = layer._reversed_padding_repeated_twice
    a = F.pad(a, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if a.dim() == 3:  # one-dimensional: images of height 1
        a, kernel, dilation, stride = a[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    pick, groups = _patches(tuple(a.shape[1:]), kernel, dilation, stride, a.device), layer.groups
    if groups == 1:
        return {"weight": Product(delta.flatten(1, 2), a.flatten(1), pick), **bias}
    patches = a.flatten(1)[:, pick.long()]
    by_group = delta.reshape(n, targets, groups, out // groups, -1).transpose(1, 2).reshape(n * groups, -1, delta.shape[3])
    inputs = patches.reshape(n, patches.shape[1], groups, -1).transpose(1, 2).reshape(n * groups, patches.shape[1], -1)
    weight = torch.bmm(by_group, inputs).reshape(n, groups, targets, -1).transpose(1, 2)
    return {"weight": Whole(weight.reshape(n, targets, *layer.weight.shape)), **bias}


@lru_cache(maxsize=64)
def _patches(image: tuple[int, ...], kernel: Any, dilation: Any, stride: Any, device: torch.device) -> Tensor:
    """Where the patches of an image ``(channels, height, width)`` are in it: ``(positions, channels × kernel)``.

    Picking elements by number is two to three times as fast as ``unfold``, and gives the order that products like.
    """
    numbers = torch.arange(math.prod(image), dtype=torch.float64).view(1, *image)
    return F.unfold(numbers, kernel, dilation, 0, stride)[0].t().to(device, torch.int32).contiguous()


def _embedding(layer: Any, index: Tensor, delta: Tensor) -> Gradients:
    n, targets = delta.shape[:2]
    index, delta = index.reshape(n, -1), delta.reshape(n, targets, -1, delta.shape[-1])
    if layer.padding_idx is not None:  # torch gives this row no gradient
        delta = delta * (index != layer.padding_idx)[:, None, :, None]
    return {"weight": Rows(index, delta)}


def _layer_norm(layer: Any, a: Tensor, delta: Tensor) -> Gradients:
    n, targets = delta.shape[:2]
    a = a.reshape(n, 1, -1, *layer.normalized_shape)
    delta = delta.reshape(n, targets, -1, *layer.normalized_shape)
    return {"weight": Whole((delta * a).sum(2)), "bias": Whole(delta.sum(2))}


def _transposed_linear(layer: Any, a: Tensor, delta: Tensor) -> Gradients:
    """A linear layer that holds its weight as ``(inputs, outputs)``, as transformers' Conv1D does."""
    n, targets = delta.shape[:2]
    a = a.reshape(n, 1, -1, a.shape[-1])
    delta = delta.reshape(n, targets, -1, delta.shape[-1])
    return {"weight": Whole(a.transpose(2, 3) @ delta), "bias": Whole(delta.sum(2))}


def _root_mean_square(layer: Any, a: Tensor) -> Tensor:
    """The input over its root mean square, as norms without a mean have it; their ε goes by several names."""
    epsilon = next((getattr(layer, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(layer, name)), 1e-6)
    found: Tensor = a * (a.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return found


def _scale(layer: Any, a: Tensor, delta: Tensor) -> Gradients:
    n, targets, width = *delta.shape[:2], a.shape[-1]
    return {"weight": Whole((delta.reshape(n, targets, -1, width) * a.reshape(n, 1, -1, width)).sum(2))}


def _channel_norm(layer: Any, a: Tensor, delta: Tensor) -> Gradients:
    a, delta = a[:, None].flatten(3) if a.dim() > 2 else a[:, None, :, None], delta.reshape(*delta.shape[:3], -1)
    return {"weight": Whole((delta * a).sum(3)), "bias": Whole(delta.sum(3))}


def _batch_normalised(layer: Any, a: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (a.dim() - 2)
    normalised: Tensor = (a - layer.running_mean.view(shape)) * (layer.running_var + layer.eps).rsqrt().view(shape)
    return normalised


LAYER_RULES: dict[type[nn.Module] | str, Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _channel_norm,
    nn.BatchNorm1d: _channel_norm,
    nn.BatchNorm2d: _channel_norm,
    nn.BatchNorm3d: _channel_norm,
    "Conv1D": _transposed_linear,
    "RMSNorm": _scale,
    "T5LayerNorm": _scale,
}
"""By type, or by the end of a class's name, for layers of libraries that are not imported here. What a rule gives is compared
with plain autograd before it is used, so a class of the same name that does something else costs time and no more."""

KEPT: dict[type[nn.Module] | str, Callable[[Any, Tensor], Tensor]] = {
    nn.LayerNorm: lambda layer, a: F.layer_norm(a, layer.normalized_shape, eps=layer.eps),
    nn.RMSNorm: lambda layer, a: F.rms_norm(a, layer.normalized_shape, eps=layer.eps),
    nn.GroupNorm: lambda layer, a: F.group_norm(a, layer.num_groups, eps=layer.eps),
    nn.BatchNorm1d: _batch_normalised,
    nn.BatchNorm2d: _batch_normalised,
    nn.BatchNorm3d: _batch_normalised,
    "RMSNorm": _root_mean_square,
    "T5LayerNorm": _root_mean_square,
}
"""What a layer's rule needs of its input, where that is not the input itself."""


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule of a layer's type, or of the end of its name."""
    found: Rule | None = _entry(LAYER_RULES, layer)
    return found


def kept_of(layer: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """What the layer's rule needs of its input; None for the input itself."""
    found: Callable[[Any, Tensor], Tensor] | None = _entry(KEPT, layer)
    return found


def _entry(table: dict[type[nn.Module] | str, Any], layer: nn.Module) -> Any:
    kind = type(layer)
    if kind in table or kind.__module__.startswith("torch.nn."):
        return table.get(kind)
    return next((rule for name, rule in table.items() if isinstance(name, str) and kind.__name__.endswith(name)), None)
