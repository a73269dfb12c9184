"""How many multiply-accumulates a forward pass takes: what torch's counter sees, and the kernels that it does not see.

A matrix product ``(m, k) × (k, n)`` takes ``m k n``, and everything here is one: linear layers, convolutions, attention's two
products, the gates of recurrent layers. Sums, activations, norms and look-ups (embeddings) take none. Theoretical: what dense
kernels compute, zeros included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunekit.batch import Inputs, call, fresh

Shape = Sequence[int]


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass, as the model is: its mode, its device."""
    with torch.no_grad(), unfused(), FlopCounterMode(display=False, custom_mapping=_kernels()) as counter:
        call(model, fresh(inputs))
    return int(counter.get_total_flops()) // 2


@contextmanager
def unfused() -> Iterator[None]:
    """torch's encoder and attention layers run one fused kernel in evaluation mode, in which no product can be seen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """``(…, heads, queries, d)``, ``(…, heads, keys, d)``, ``(…, heads, keys, dv)``; queries may share the heads of keys."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(inputs: Shape, weights: Sequence[Shape]) -> int:
    """Every matrix of a recurrent layer meets every time step of every sample; inputs ``(…, features)``."""
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _recurrent_layer(inputs: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    return _recurrent(inputs, [first, second])


def _recurrent_layers(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _recurrent(inputs, weights)


def _vectors(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """``(m, k) × (k)`` or ``(k) · (k)``."""
    return 2 * prod(first)


def _added_vectors(added: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(first)


def _added_batches(added: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """``(b, m, k) × (b, k, n)``, summed over b."""
    return 2 * prod(first) * second[-1]


def _grouped(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """Rows in groups, each with a matrix of its own (experts)."""
    shared = first[0] if len(first) == 3 and len(second) == 2 else 1
    return 2 * prod(first) * second[-1] // shared


def _bilinear(first: Shape, weight: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """``(rows, i)``, ``(o, i, j)``, ``(rows, j)``: one for every weight and row."""
    return 2 * prod(first[:-1]) * prod(weight)


def _conv_tbc(inputs: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Time first: ``(time, batch, in)``, ``(width, in, out)``."""
    return 2 * prod(out_shape[:-1]) * prod(weight)


KERNELS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn_rnn_layer": _recurrent_layer,
    "_cudnn_rnn": _recurrent_layers,
    "miopen_rnn": _recurrent_layers,
    "_trilinear": _bilinear,
    "mv": _vectors,
    "dot": _vectors,
    "vdot": _vectors,
    "addmv": _added_vectors,
    "addbmm": _added_batches,
    "_grouped_mm": _grouped,
    "conv_tbc": _conv_tbc,
}
"""FLOPs, two a multiply-accumulate, by kernel: those that torch's counter lacks, or counts for some shapes only."""


def _kernels() -> dict[Any, Callable[..., int]]:
    """Those that this release of torch has."""
    return {getattr(torch.ops.aten, name): count for name, count in KERNELS.items() if hasattr(torch.ops.aten, name)}
