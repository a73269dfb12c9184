"""How large a model is: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def sizes(model: nn.Module, sample: Tensor) -> dict[str, int]:
    """``parameters``, ``nonzero`` (parameters other than 0) and ``macs`` of one sample.

    MACs are theoretical: what dense kernels compute, zeros included, half of the FLOPs that torch counts.

    Args:
        sample: one sample with its batch axis, ``(1, ...)``.
    """
    parameters = list(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(sample)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int((p != 0).sum()) for p in parameters),
        "macs": int(counter.get_total_flops()) // 2,
    }
