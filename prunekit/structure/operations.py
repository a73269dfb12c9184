"""What torch's operations do with labels: a table by name, and three families (pointwise, movements, reductions).

A rule gets the trace, the arguments and the outputs, and gives the layers of every output. Whatever has no rule holds all
labels that go in. Nothing here has to be right for a model to be pruned right: what is read wrongly fails the check by running.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.structure.labels import GIVEN, NOTHING, Layers, along, given, support, tidy, united_along
from prunekit.structure.meeting import Reading, is_given, joined
from prunekit.structure.products import (
    added_matrix,
    batch_normed,
    convolved,
    group_normed,
    layer_normed,
    linear,
    matrix,
    weight_normed,
)  # fmt: skip

Rule = Callable[[Reading, Sequence[Any], dict[str, Any], Tensor], Layers]
"""Trace, arguments, keyword arguments, the (first) output -> its layers."""
LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full",
        "new_empty", "_local_scalar_dense", "is_nonzero", "sym_size", "argmax", "argmin", "bernoulli", "equal")  # fmt: skip
"""What comes out does not depend on which unit is where, or is no number of a unit."""
MOVES = ("t", "transpose", "permute", "squeeze", "unsqueeze", "expand", "repeat", "flip", "roll", "pixel_shuffle",
         "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "unfold")  # fmt: skip
SAME = ("alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "tril", "triu", "_pin_memory")
SHARED = re.compile(
    r"_?(adaptive_)?(max|avg)_pool(\d)d(_with_indices)?|_?upsample_\w+?(\d)d(_aa)?"
    r"|(reflection|replication)_pad(\d)d|grid_sampler_(\d)d"
)
ELEMENTWISE = ("hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "celu", "selu", "silu", "mish", "gelu", "softplus",
               "log_sigmoid_forward", "relu6", "threshold", "softshrink", "hardshrink", "clamp", "dropout", "native_dropout",
               "rrelu_with_noise", "_prelu_kernel", "masked_fill", "where", "addcmul", "addcdiv", "lerp", "nan_to_num", "fill",
               "complex", "real", "_conj", "floor_divide", "copy")  # fmt: skip
"""Pointwise operations that torch does not always mark as such."""
COUNTING = ("mean", "var", "var_mean", "std", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "median", "prod")
REDUCING = (*COUNTING, "sum", "amax", "amin", "max", "min", "any", "all", "nansum")
KEEPING = ("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort")


def rule_of(name: str, pointwise: bool) -> Any:
    """The rule of an operation; None when it is not read."""
    if name in RULES:
        return RULES[name]
    if name in SAME:
        return lambda trace, args, options, out: trace.of(args[0])
    if name in REDUCING:
        return _reduced
    if name in KEEPING:
        return _normalised
    if name in ELEMENTWISE:
        return _pointwise
    if SHARED.fullmatch(name):
        return _pooled
    if pointwise:
        return _pointwise
    return None


def _pointwise(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    tensors = [a for a in flat([args, {k: v for k, v in options.items() if k != "out"}]) if isinstance(a, Tensor)]
    return joined(trace, [(trace.of(t), tuple(t.shape)) for t in tensors], tuple(out.shape))


def _moved(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    move = getattr(torch.ops.aten, trace.operation.removesuffix("_"))
    return [move(layer, *args[1:], **options) for layer in trace.of(args[0])]


def _reshaped(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    found = []
    for layer in trace.of(args[0]):
        if is_given(layer):
            found += given(out.shape)
            continue
        new = tidy([layer.reshape(out.shape)])
        found += new
        for turned in new:
            if len(support(turned)) > len(support(layer)):
                trace.splits.append(turned)
    return found


def _strided(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    if tuple(out.shape) == tuple(args[0].shape):
        return trace.of(args[0])  # only the order in memory differs
    for layer in trace.of(args[0]):
        trace.slots.hold(layer, f"{trace.where()} looks at its channels with other strides")
    return given(out.shape)


def _sliced(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    source, axis = args[0], _axis(args, options, "dim", 1, args[0].dim())
    size, length = out.shape[axis], source.shape[axis]
    found = []
    for layer in trace.of(source):
        if axis in support(layer) and size not in (0, length):
            start = int(args[2] or 0) if len(args) > 2 else 0
            start = start + length if start < 0 else start
            step = int(args[4]) if len(args) > 4 else 1
            if step == 1 and length % size == 0 and start % size == 0:
                _same_place(trace, layer, axis, size)
            else:
                trace.slots.hold(layer, f"{trace.where()} takes a part of its channels")
        found.append(torch.ops.aten.slice(layer, *args[1:], **options))
    return found


def _same_place(trace: Reading, layer: Tensor, axis: int, size: int) -> None:
    """What lies at the same place of every part of ``size`` leaves together, so that the parts stay as long as each other."""
    parts = layer.unflatten(axis, (-1, size))
    united_along(trace.slots, parts, [axis], f"{trace.where()} splits its channels")


def _split(trace: Reading, args: Sequence[Any], options: dict[str, Any], outputs: Sequence[Tensor]) -> list[Layers]:
    axis = _axis(args, options, "dim", 2, args[0].dim())
    sizes = [out.shape[axis] for out in outputs]
    found: list[Layers] = [[] for _ in outputs]
    for layer in trace.of(args[0]):
        if axis in support(layer) and len(sizes) > 1 and len(set(sizes)) == 1:
            _same_place(trace, layer, axis, sizes[0])
        for layers, part in zip(found, layer.split(sizes, axis), strict=True):
            layers.append(part)
    return found


def _unbound(trace: Reading, args: Sequence[Any], options: dict[str, Any], outputs: Sequence[Tensor]) -> list[Layers]:
    axis = _axis(args, options, "dim", 1, args[0].dim())
    found: list[Layers] = [[] for _ in outputs]
    for layer in trace.of(args[0]):
        for layers, part in zip(found, layer.unbind(axis), strict=True):
            layers.append(part)
    return found


def _selected(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    return [layer.select(args[1], args[2]) for layer in trace.of(args[0])]


def _padded(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    found = []
    for layer in trace.of(args[0]):
        padded = {layer.dim() - 1 - i // 2 for i, n in enumerate(args[1]) if n}
        if is_given(layer):
            found += given(out.shape)
        elif padded & support(layer):
            found.append(torch.constant_pad_nd(layer, args[1], NOTHING))
        else:
            for axis in padded:
                layer = layer.narrow(axis, 0, 1)
            found.append(layer.expand(out.shape))
    return found


def _concatenated(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    tensors = [t for t in args[0] if not (t.dim() == 1 and t.numel() == 0)]
    axis = _axis(args, options, "dim", 1, out.dim())
    return _placed(trace, [(trace.of(t), tuple(t.shape)) for t in tensors], axis, tuple(out.shape))


def _stacked(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    axis = _axis(args, options, "dim", 1, out.dim())
    parts = []
    for tensor in args[0]:
        layers = [layer.unsqueeze(axis) for layer in trace.of(tensor)]
        parts.append((layers, (*tensor.shape[:axis], 1, *tensor.shape[axis:])))
    return _placed(trace, parts, axis, tuple(out.shape))


def _placed(trace: Reading, parts: Sequence[tuple[Layers, tuple[int, ...]]], axis: int, shape: tuple[int, ...]) -> Layers:
    """Layers of tensors side by side: what varies along other axes has to agree, what varies along this one follows."""
    thin = tuple(1 if a == axis else n for a, n in enumerate(shape))
    across = [
        ([layer.narrow(axis, 0, 1) for layer in layers if axis not in support(layer)], thin)
        for layers, size in parts
        if size[axis]
    ]
    if len(parts) > 1:
        across = [([la for la in layers if not is_given(la)] or layers, size) for layers, size in across]
    found = [layer.expand(shape) for layer in joined(trace, across, thin) if not is_given(layer)]
    following = [[layer for layer in layers if axis in support(layer)] for layers, _ in parts]
    for depth in range(max(map(len, following), default=0)):
        pieces = []
        for layers, (all_layers, size) in zip(following, parts, strict=True):
            fill = GIVEN if any(is_given(layer) for layer in all_layers) else NOTHING
            pieces.append(layers[depth] if depth < len(layers) else torch.full((1,) * len(size), fill).expand(size))
        found += tidy([torch.cat(pieces, axis)])
    if not found and any(is_given(layer) for layers, _ in parts for layer in layers):
        return given(shape)
    return found


def _reduced(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    source = args[0]
    name = trace.operation
    axes = _axes(args[1:] if name in ("norm", "linalg_vector_norm") else args, options, source.dim())
    keep = out.dim() == source.dim()
    found = []
    for layer in trace.of(source):
        if is_given(layer):
            found += given(out.shape)
            continue
        varies = support(layer)
        if varies & axes and varies <= axes:
            if name in COUNTING:
                trace.slots.hold(layer, f"{trace.where()}: a {name} over them counts its units")
                continue
            if name in ("sum", "nansum"):
                continue  # what is 0 adds nothing
        layer = united_along(trace.slots, layer, sorted(axes), f"{trace.where()}: a {name} over its channels")
        found.append(layer if keep else layer.flatten()[:1].view(()) if not out.dim() else _without(layer, axes))
    return tidy(found)


def _without(layer: Tensor, axes: set[int]) -> Tensor:
    for axis in sorted(axes, reverse=True):
        layer = layer.select(axis, 0)
    return layer


def _normalised(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    axis = _axis(args, options, "dim", 1, out.dim())
    found = []
    for layer in trace.of(args[0]):
        if support(layer) == {axis}:
            trace.slots.hold(layer, f"{trace.where()}: a softmax, sum or order over them counts its units")
        elif axis in support(layer):
            united_along(trace.slots, layer, [axis], "")
        found.append(layer)
    return found


def _pooled(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    """Places are mixed, channels are not."""
    digits = re.search(r"(\d)d", trace.operation)
    places = range(out.dim() - int(digits[1]) if digits else 2, out.dim())
    why = f"{trace.where()} mixes places"
    return [united_along(trace.slots, layer, places, why).expand(out.shape) for layer in trace.of(args[0])]


def _embedded(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    return [along(layer[0], out.dim() - 1, tuple(out.shape)) for layer in trace.of(args[0]) if support(layer) == {1}]


def _gated(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    axis = _axis(args, options, "dim", 1, out.dim(), default=-1)
    found = []
    for layer in trace.of(args[0]):
        if axis in support(layer):
            _same_place(trace, layer, axis, out.shape[axis])
        found.append(layer.narrow(axis, 0, out.shape[axis]))
    return found


def _copied(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    layers = joined(trace, [(trace.of(args[1]), tuple(args[1].shape)), (trace.of(args[0]), tuple(out.shape))], tuple(out.shape))
    part, whole, found = args[0], trace.sliced.get(args[0]), layers
    while whole is not None:  # what is written into a part stands in the whole too
        shape, there = tuple(whole.shape), []
        for layer in found:
            for axis, size in enumerate(shape):
                if part.shape[axis] != size:
                    layer = united_along(trace.slots, layer, [axis], f"{trace.where()} writes channels into a part of a tensor")
            there.append(layer.expand(shape))
        found = tidy(joined(trace, [(there, shape), (trace.of(whole), shape)], shape))
        trace.put(whole, found)
        part, whole = whole, trace.sliced.get(whole)
    return layers


def _picked(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    """``index_select`` and ``gather``."""
    axis = _axis(args, options, "dim", 1, args[0].dim())
    found = []
    for layer in trace.of(args[0]):
        if axis in support(layer):
            trace.slots.hold(layer, f"{trace.where()} picks some of its channels")
            return given(out.shape)
        thin = layer.narrow(axis, 0, 1)
        for a in range(out.dim()):
            thin = thin.narrow(a, 0, min(thin.shape[a], out.shape[a]))
        found.append(thin.expand(out.shape))
    return found


def _indexed(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    indexed = {axis for axis, index in enumerate(args[1]) if index is not None}
    wide = {
        axis + i
        for axis, index in enumerate(args[1])
        if index is not None and index.dtype == torch.bool
        for i in range(index.dim())
    }
    found = []
    for layer in trace.of(args[0]):
        if support(layer) & (indexed | wide):
            trace.slots.hold(layer, f"{trace.where()} picks some of its channels")
        found.append(torch.ops.aten.index(layer.contiguous(), args[1]))
    return tidy(found) if found and not is_given(found[0]) else found


def _attended(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    """Fused attention ``(samples, heads, positions, size)``: queries and keys meet, values go through."""
    for tensor in args[:2]:
        for layer in trace.of(tensor):
            trace.slots.hold(layer, f"{trace.where()} multiplies channels with channels (attention of no known kind)")
    found = []
    for layer in trace.of(args[2]):
        if tuple(layer.shape[:-2]) != tuple(out.shape[:-2]) or -2 % layer.dim() in support(layer):
            trace.slots.hold(layer, f"{trace.where()} shares values between heads")
            return given(out.shape)
        found.append(layer.narrow(-2, 0, 1).expand(out.shape))
    return found


RULES: dict[str, Any] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"), _reshaped),
    "as_strided": _strided, "slice": _sliced, "select": _selected, "constant_pad_nd": _padded, "cat": _concatenated,
    "stack": _stacked,
    "convolution": convolved, "_convolution": convolved, "mm": matrix, "bmm": matrix, "mv": matrix, "dot": matrix,
    "vdot": matrix, "addmm": added_matrix, "baddbmm": added_matrix, "addmv": added_matrix, "linear": linear,
    "native_batch_norm": batch_normed, "_native_batch_norm_legit": batch_normed, "cudnn_batch_norm": batch_normed,
    "_native_batch_norm_legit_no_training": lambda trace, args, options, out: batch_normed(trace, args[:5], options, out),
    "native_group_norm": group_normed, "native_layer_norm": layer_normed, "_weight_norm_interface": weight_normed,
    "embedding": _embedded, "_embedding_bag": _embedded,
    "_embedding_bag_forward_only": _embedded, "glu": _gated, "copy_": _copied, "index_select": _picked,
    "gather": _picked, "index": _indexed,
    "_scaled_dot_product_flash_attention_for_cpu": _attended, "_scaled_dot_product_efficient_attention": _attended,
    "_scaled_dot_product_flash_attention": _attended,
}  # fmt: skip
"""Operation -> rule; see also ``rule_of``."""

PARTS = {
    "split": _split,
    "split_with_sizes": _split,
    "unsafe_split": _split,
    "unsafe_split_with_sizes": _split,
    "unbind": _unbound,
}
"""Operations that give several tensors, all of which have channels."""


def _axis(args: Sequence[Any], options: dict[str, Any], name: str, place: int, rank: int, default: int = 0) -> int:
    axis = options.get(name, args[place] if len(args) > place else default)
    return int(axis) % max(rank, 1)


def _axes(args: Sequence[Any], options: dict[str, Any], rank: int) -> set[int]:
    """Axes that are reduced; all when none is named."""
    for value in (options.get("dim"), *args[1:]):
        if isinstance(value, list | tuple):
            return {int(a) % max(rank, 1) for a in value} or set(range(rank))
        if isinstance(value, int) and not isinstance(value, bool):
            return {value % max(rank, 1)}
    return set(range(rank))


def flat(nest: Any) -> list[Any]:
    if isinstance(nest, list | tuple):
        return [leaf for part in nest for leaf in flat(part)]
    if isinstance(nest, dict):
        return flat(list(nest.values()))
    return [nest]
