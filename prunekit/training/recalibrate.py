"""BatchNorm's running statistics measured anew: pruning changes what arrives at a norm, its statistics stay as they were."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Batch, called, to
from prunekit.data import Samples


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Replaces the running statistics of every BatchNorm layer of ``model`` by the plain average over ``batches``.

    Every batch counts the same (``momentum=None``, the cumulative average). Weights do not move; layers other than
    BatchNorm run in evaluation mode; modes and momenta are put back. Several ranks share the batches, each of them whole.

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
        own_sums = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)  # over ranks that must meet at every batch
        with ranks.apart() if own_sums else nullcontext():
            own = batches.dealt() if isinstance(batches, Samples) else islice(batches, ranks.rank(), None, ranks.size())
            for x, _ in own:
                called(model, to(x, device))
            _averaged(norms)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)


def _averaged(norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
    """Makes averages over each rank's batches those over all; of a norm that no batch reached nothing changes."""
    if ranks.size() == 1:
        return
    sums: list[tuple[Tensor, ...]] = []
    for norm in norms:
        assert norm.num_batches_tracked is not None
        count = norm.num_batches_tracked.double()
        sums.append((count, *(count * statistic.double() for statistic in _statistics(norm))))
    ranks.add_up(tensor for each in sums for tensor in each)
    for norm, (count, *totals) in zip(norms, sums, strict=True):
        if count > 0:
            norm.num_batches_tracked = count.long()
            for statistic, total in zip(_statistics(norm), totals, strict=True):
                statistic.copy_(total / count)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
