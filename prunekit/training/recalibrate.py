"""BatchNorm's running statistics measured anew: pruning changes what arrives at a norm, its statistics stay as they were."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from prunekit.batch import Batch, called, to


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Replaces the running statistics of every BatchNorm layer of ``model`` by the plain average over ``batches``.

    Every batch counts the same (``momentum=None``, the cumulative average). Weights do not move; layers other than
    BatchNorm run in evaluation mode; modes and momenta are put back.

    Args:
        batches: ``(inputs, labels)`` of the training split.

    Returns:
        how many layers there are; 0 means that nothing was done.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for x, _ in batches:
            called(model, to(x, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)
