"""Mini-batch training by sample indices, with a recorder beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import NonFiniteError
from prunekit.progress import track
from prunekit.training.distill import Distillation
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
    begin: int | None = None,
    end: int | None = None,
    distill: Distillation | None = None,
    after_step: Callable[[int], None] = lambda steps: None,
    stage: str = "train",
) -> list[float]:
    """Trains in place; returns each epoch's mean training loss (of the steps taken here, when resumed within one).

    Args:
        scheduler: stepped after every optimizer step; None for a constant rate.
        batch: indices ``(k,)`` -> inputs and labels.
        samples: how many training samples there are.
        seed: of the order of samples.
        begin: steps before this one are passed over, in the same order of samples; by default those that a resumed
            ``recorder`` holds already. ``end``: where to stop, short of all epochs.
        distill: joins a teacher's soft labels to the loss.
        after_step: called with the number of steps behind, once weights and rates have moved.
        stage: for the progress bar and the message.

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
    first = begin if begin is not None else recorder.steps if recorder is not None else 0
    last = epochs * steps if end is None else min(end, epochs * steps)
    for step, (epoch, indices) in enumerate(track(islice(order(), last), stage, last)):
        if step < first:
            continue
        x, y = batch(indices)
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        outputs = model(x)
        value = loss(outputs, y)
        if distill is not None:
            value = distill(value, outputs, x)
        current = value.item()
        if not math.isfinite(current):
            rate = "train.lr" if stage == "train" else "finetune.lr"
            raise NonFiniteError(f"{stage}: the loss is {current} in epoch {epoch + 1}, step {step}; lower {rate}")
        value.backward()
        if recorder is not None:
            recorder.batch(indices)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        after_step(step + 1)
        total, count = total + current * len(indices), count + len(indices)
        if (step + 1) % steps == 0 or step + 1 == last:
            history.append(total / count)
            total, count = 0.0, 0
    return history
