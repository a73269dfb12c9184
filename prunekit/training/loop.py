"""Mini-batch training by sample indices, with a recorder beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import NonFiniteError
from prunekit.progress import track
from prunekit.trajectory import Recorder

Batch = Callable[[Tensor], tuple[Tensor, Tensor]]


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """The last batch may be smaller; none is dropped."""
    return math.ceil(samples / batch_size)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
    samples: int,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    recorder: Recorder | None = None,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Trains in place; returns each epoch's mean training loss (of the steps taken here, when resumed within one).

    Args:
        scheduler: stepped after every optimizer step; None for a constant rate.
        batch: indices ``(k,)`` -> inputs and labels.
        samples: how many training samples there are.
        seed: of the order of samples.

    Raises:
        NonFiniteError: the loss became NaN or Inf; names epoch and step.
    """
    generator = torch.Generator().manual_seed(seed)
    history: list[float] = []
    steps = batches_per_epoch(samples, batch_size)
    model.train()

    def order() -> Any:
        for epoch in range(epochs):
            permutation = torch.randperm(samples, generator=generator)
            for begin in range(0, samples, batch_size):
                yield epoch, permutation[begin : begin + batch_size]

    total, count = 0.0, 0
    done = recorder.steps if recorder is not None else 0  # a resumed recording: those steps are taken already
    for step, (epoch, indices) in enumerate(track(order(), "train", epochs * steps)):
        if step < done:
            continue
        x, y = batch(indices)
        optimizer.zero_grad()
        value = loss(model(x.to(device)), y.to(device))
        current = value.item()
        if not math.isfinite(current):
            raise NonFiniteError(f"train: the loss is {current} in epoch {epoch + 1}, step {step}; lower train.lr")
        value.backward()
        if recorder is not None:
            recorder.batch(indices)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total, count = total + current * len(indices), count + len(indices)
        if (step + 1) % steps == 0:
            history.append(total / count)
            total, count = 0.0, 0
    return history
