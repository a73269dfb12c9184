"""Why a model that computes much less is hardly faster: threads, small layers, memory, or the kernels themselves."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from prunekit.batch import Inputs, answers, call, device_of, size
from prunekit.measure.latency import Watch, threads, timed
from prunekit.measure.undisturbed import placed, undisturbed

FEWER, FASTER = 1 / 3, 0.05
"""A reason is due where this share of the MACs is gone and less than this share of the time."""
SMALL = 0.05
"""Milliseconds of a layer, below which calling it is most of its cost (dispatch and kernel start take tens of microseconds)."""
BALANCE = 10
"""MACs a byte, below which memory is what is waited for: the order of the ridge of the roofline model on processors and

accelerators (Williams et al. 2009, doi 10.1145/1498765.1498785)."""


def is_due(macs: tuple[float, float], ms: tuple[float, float]) -> bool:
    """Whether MACs fell by ``FEWER`` and time did not fall by ``FASTER``; each is ``(dense, pruned)``."""
    return macs[1] <= (1 - FEWER) * macs[0] and ms[1] > (1 - FASTER) * ms[0]


def reason(pruned: nn.Module, x: Inputs, macs: float, ms: float, watch: Watch | None = None) -> str:
    """A sentence on what the time of the pruned model goes into, by the first rule that fits.

    1. Thread count: it computes with several threads, and one is no slower (measured, 5 %).
    2. Small layers: a layer takes less than ``SMALL`` milliseconds on average.
    3. Memory-bound: fewer than ``BALANCE`` MACs for every byte of weights read and outputs written.
    4. Else the kernels: narrower layers use them less well.

    Args:
        macs: of one sample.
        ms: median milliseconds of the batch ``x``, measured.
    """
    device = device_of(pruned)
    count = torch.get_num_threads()
    if device.type == "cpu" and count > 1:
        with threads(1):
            alone = timed({"one": pruned}, x, 1.0, watch=watch).ms("one").median
        if alone <= 1.05 * ms:
            return f"thread count: one thread takes {alone:.3g} ms, {count} threads {ms:.3g} (--threads 1)"
    calls, moved = _traffic(pruned, x)
    if ms / max(calls, 1) < SMALL:
        return f"small layers: {1e3 * ms / max(calls, 1):.3g} µs a layer, most of which is calling it; a larger batch gains more"
    rate = macs * size(x) / max(moved, 1)
    if rate < BALANCE:
        return f"memory-bound: {rate:.2g} MACs for every byte that is read or written, below {BALANCE}"
    return "the kernels work less well on layers this narrow; multiples of eight channels may help (--round-to 8)"


@torch.no_grad()
def _traffic(model: nn.Module, x: Inputs) -> tuple[int, int]:
    """Layers that are called in one pass, and the bytes of their weights and outputs."""
    calls = moved = 0

    def seen(module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal calls, moved
        calls += 1
        tensors = [*module.parameters(recurse=False), *answers(output)]
        moved += sum(prod(t.shape) * t.element_size() for t in tensors)

    handles = [m.register_forward_hook(seen) for m in model.modules() if not any(True for _ in m.children())]
    try:
        with undisturbed(model):
            call(model, placed(model, x))
    finally:
        for handle in handles:
            handle.remove()
    return calls, moved
