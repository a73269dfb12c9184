"""Operations that multiply with weights, or normalise: convolutions, matrix products, and the norms of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.structure.labels import NOTHING, Layers, along, given, support, tidy, united_along
from prunekit.structure.meeting import Reading, by_channel, is_given, joined


def convolved(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    source, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    slots, where = trace.slots, trace.where()
    channels, outputs = source.shape[1], out.shape[1]
    inside, outside = channels // groups, outputs // groups
    inward, outward = (0, 1) if transposed else (1, 0)
    sent = by_channel(trace, source, 1)
    ins, outs = (by_channel(trace, weight, axis) for axis in (inward, outward))
    why = f"{where} reads what is no layer's output"
    if sent is None and ins is not None and trace.of(source):
        slots.hold(ins, why)
    elif sent is not None and ins is None and inside > 1:
        slots.hold(sent, f"{where} has a weight that is computed from others")
    elif sent is not None and ins is not None:  # a group's weight speaks of all groups' channels at the same place
        slots.unite(sent.view(-1, len(ins)) if len(ins) != channels else sent, ins, why)
    result = torch.full((outputs,), NOTHING)
    if outs is not None:
        result = outs.repeat(groups) if len(outs) != outputs else outs
    if groups > 1 and inside == 1:  # depthwise: a channel's outputs leave with it
        if sent is not None:
            slots.unite(result.view(groups, outside), sent[:, None], why)
            result = torch.maximum(result, sent.repeat_interleave(outside))
        elif trace.of(source):
            slots.hold(result, why)
        if transposed and outside > 1 and outs is not None:
            slots.hold(outs, f"{where} uses one weight for all groups")
    elif groups > 1:
        united_along(slots, result.view(groups, outside), [0], where)
    if isinstance(bias, Tensor):
        for layer in trace.of(bias):
            slots.unite(result, layer, where)
            result = torch.maximum(result, layer)
    return [along(result, 1, tuple(out.shape))] if bool((result != NOTHING).any()) else []


def _multiplied(trace: Reading, first: Layers, second: Layers, sizes: tuple[int, ...], shape: tuple[int, ...]) -> Layers:
    """Of ``(…, m, k) × (…, k, n)``: the inner axis is one of both, the outer ones stay.

    Args:
        sizes: of the first.
    """
    rank = len(sizes)
    batch = set(range(rank - 2))
    inner: list[Tensor] = []
    sides: list[list[Tensor]] = [[], []]
    found: Layers = []
    why = f"{trace.where()} reads what is no layer's output"
    for side, (layers, k, kept) in enumerate(((first, rank - 1, rank - 2), (second, rank - 2, rank - 1))):
        for layer in layers:
            if is_given(layer):
                continue
            if k in support(layer):
                flat = united_along(trace.slots, layer, [kept], f"{trace.where()} mixes places")
                sides[side].append(flat.transpose(-1, -2) if side else flat)
            else:
                found.append(layer.narrow(k, 0, 1).expand(*shape))
    inner = [*sides[0], *sides[1]]
    if bool(sides[0]) != bool(sides[1]) and first and second:  # what has no labels at all is a constant
        for layer in inner:
            trace.slots.hold(layer, why)
    for layer in inner[1:]:
        trace.slots.unite(inner[0], layer, why)
        if batch & (support(layer) | support(inner[0])):
            trace.slots.hold(layer, f"{trace.where()} multiplies channels with channels")
    if not found and (any(map(is_given, first)) or any(map(is_given, second))):
        return given(shape)
    return found


def matrix(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    first, second = args[:2]
    a, b, shape = trace.of(first), trace.of(second), tuple(out.shape)
    if second.dim() == 1:  # mv, dot
        b = [layer[:, None] for layer in b]
        shape = (*shape, 1)
    size = tuple(first.shape)
    if first.dim() == 1:
        a, size, shape = [layer[None] for layer in a], (1, *size), (1, *shape)
    found = _multiplied(trace, a, b, size, shape)
    return tidy(layer.reshape(out.shape) for layer in found) if shape != tuple(out.shape) else found


def added_matrix(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    product = matrix(trace, args[1:], options, out)
    return joined(trace, [(product, tuple(out.shape)), (trace.of(args[0]), tuple(args[0].shape))], tuple(out.shape))


def linear(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    source, weight = args[:2]
    flat = [layer.reshape(-1, source.shape[-1]) for layer in trace.of(source)]
    size = (source.numel() // max(1, source.shape[-1]), source.shape[-1])
    turned = [layer.t() for layer in trace.of(weight)]
    product = [
        layer.reshape(out.shape) for layer in _multiplied(trace, tidy(flat) or flat, turned, size, (size[0], out.shape[-1]))
    ]
    bias = args[2] if len(args) > 2 else None
    if not isinstance(bias, Tensor):
        return tidy(product)
    return joined(trace, [(tidy(product), tuple(out.shape)), (trace.of(bias), tuple(bias.shape))], tuple(out.shape))


def batch_normed(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    source, shape = args[0], tuple(out.shape)
    layers = trace.of(source)
    if args[3] is None or (len(args) > 5 and args[5] is True):  # statistics of these very samples
        others = [a for a in range(source.dim()) if a != 1]
        layers = [united_along(trace.slots, layer, others, trace.where()).expand(shape) for layer in layers]
    beside = [
        ([along(layer, 1, shape) for layer in trace.of(tensor)], shape) for tensor in args[1:5] if isinstance(tensor, Tensor)
    ]
    return joined(trace, [(layers, shape), *beside], shape)


def group_normed(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    source, weight, bias, channels, groups = args[0], args[1], args[2], args[4], args[6]
    labels = by_channel(trace, source, 1)
    shape = tuple(out.shape)
    if labels is None:
        return trace.of(source)
    why = f"{trace.where()} is a GroupNorm of {groups} groups of {channels // groups} channels, of which only whole ones can go"
    if channels > groups:
        united_along(trace.slots, labels.view(groups, -1), [1], why)
    if groups == 1:
        trace.slots.hold(labels, f"{trace.where()} is a GroupNorm of one group; removing channels would change its statistics")
    beside = [([along(layer, 1, shape) for layer in trace.of(t)], shape) for t in (weight, bias) if isinstance(t, Tensor)]
    return joined(trace, [([along(labels, 1, shape)], shape), *beside], shape)


def layer_normed(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    over = set(range(out.dim() - len(args[1]), out.dim()))
    for layer in trace.of(args[0]):
        if support(layer) & over:
            why = f"{trace.where()} is a LayerNorm; removing channels would change the statistics it divides by"
            trace.slots.hold(layer, why)
    return _meeting(trace, [args[0], *args[2:4]], out)


def weight_normed(trace: Reading, args: Sequence[Any], options: dict[str, Any], out: Tensor) -> Layers:
    """``g v / ‖v‖``, the norm over all but one axis."""
    for layer in (*trace.of(args[0]), *trace.of(args[1])):
        trace.slots.hold(
            layer, f"{trace.where()} is weight-normed: a removed output is 0/0 while it is masked, inputs are counted"
        )
    return _meeting(trace, args[:2], out)


def _meeting(trace: Reading, tensors: Sequence[Any], out: Tensor) -> Layers:
    shape = tuple(out.shape)
    return joined(trace, [(trace.of(t), tuple(t.shape)) for t in tensors if isinstance(t, Tensor)], shape)
