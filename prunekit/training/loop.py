"""Mini-batch training by sample indices, with a recorder beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Batch, called, fresh, to
from prunekit.errors import NonFiniteError, PrunekitError
from prunekit.progress import track
from prunekit.task import Classification, Task
from prunekit.training.augment import Augment, augmented
from prunekit.training.distill import Distillation
from prunekit.training.parts import Part, shared
from prunekit.trajectory import Recorder

Fetch = Callable[[Tensor], Batch]


def batches_per_epoch(samples: int, batch_size: int, drop_last: bool = False) -> int:
    """How many batches; the last may be smaller, or is dropped then (never the only one)."""
    return max(1, samples // batch_size) if drop_last else math.ceil(samples / batch_size)


@dataclass(frozen=True)
class TrainOptions:
    """On what a model is trained, and how long.

    Attributes:
        batch: indices ``(k,)`` of training samples -> inputs and labels.
        samples: how many training samples there are.
        task: which of the model's answers counts and which loss is lowered; classification when not given.
        epochs, batch_size: of one run.
        seed: of the order of samples.
        drop_last: leave out an epoch's last batch where it is smaller than the others; the order is new in every epoch.
        augment: changes the inputs of every step, by a seed made of ``seed`` and the step, which is recorded.
        distill: joins a teacher's soft labels to the loss.
        most: steps, where they end before ``epochs`` do.
    """

    batch: Fetch
    samples: int
    _: KW_ONLY
    task: Task = field(default_factory=Classification)
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    drop_last: bool = False
    augment: Augment | None = None
    distill: Distillation | None = None
    device: torch.device | str = "cpu"
    most: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs."""
        whole = self.epochs * batches_per_epoch(self.samples, self.batch_size, self.drop_last)
        return whole if self.most is None else min(self.most, whole)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    how: TrainOptions,
    *,
    recorder: Recorder | None = None,
    begin: int | None = None,
    end: int | None = None,
    after_step: Callable[[int], None] = lambda steps: None,
    after_epoch: Callable[[int], bool] = lambda epochs: False,
    stage: str = "train",
) -> list[float]:
    """Trains in place; returns each epoch's mean training loss, those before a resumed recording went on too.

    Ranks share every step's batch (``prunekit.training.parts``), and what their recorders record together.

    Args:
        scheduler: stepped after every optimizer step; None for a constant rate.
        begin: steps before this one are passed over, in the same order of samples; by default those that a resumed
            ``recorder`` holds already. ``end``: where to stop, short of all epochs.
        after_step: called with the number of steps behind, once weights and rates have moved.
        after_epoch: called with the number of epochs behind; training ends when it says True.
        stage: for the progress bar and the message.

    Raises:
        NonFiniteError: the loss became NaN or Inf; names epoch and step.
    """
    generator = torch.Generator().manual_seed(how.seed)
    history: list[float] = []
    steps = batches_per_epoch(how.samples, how.batch_size, how.drop_last)
    model.train()

    def order() -> Any:
        for epoch in range(how.epochs):
            permutation = torch.randperm(how.samples, generator=generator)
            for begin in range(0, steps * how.batch_size, how.batch_size):
                yield epoch, permutation[begin : begin + how.batch_size]

    total, count = 0.0, 0
    if recorder is not None and recorder.resumed:
        history = recorder.aside.get("losses", history)
        total, count = recorder.aside.get("epoch", (total, count))
    first = begin if begin is not None else recorder.steps if recorder is not None else 0
    last = how.steps if end is None else min(end, how.steps)
    with shared(model, how.seed) as trained:
        for step, (epoch, indices) in enumerate(track(islice(order(), last), stage, last)):
            if step < first:
                continue
            part = Part.of(indices, how.seed, step)
            optimizer.zero_grad()
            with ranks.carrying():
                value, counts = _loss(trained, how, part)
            current = value.item()
            if not math.isfinite(current):
                rate = "train.lr" if stage == "train" else "finetune.lr"
                raise NonFiniteError(f"{stage}: the loss is {current} in epoch {epoch + 1}, step {step}; lower {rate}")
            with ranks.carrying():
                (value * ranks.size()).backward()  # the mean over ranks is taken of gradients
            if recorder is not None:
                part.note(recorder, counts, how.augment is not None)
            with ranks.apart():  # the first one's recorder writes, and none waits for that
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
            after_step(step + 1)
            total, count = total + current * len(indices), count + len(indices)
            if (step + 1) % steps == 0 or step + 1 == last:
                history.append(ranks.total(total) / count)
                total, count = 0.0, 0
            if recorder is not None:
                recorder.aside |= {"losses": history, "epoch": [total, count]}
            if (step + 1) % steps == 0 and after_epoch((step + 1) // steps):
                break
    return history


def _loss(model: nn.Module, how: TrainOptions, part: Part) -> tuple[Tensor, list[float]]:
    """This rank's part of the batch's loss, and what every rank's mean counts in it."""
    kind, rank = how.task, ranks.rank()
    seen = augmented(how.batch, how.augment) if how.augment is not None else how.batch
    x, y = seen(part.own, *([] if how.augment is None else [part.seeds[rank]]))
    x, y = to(x, how.device), to(y, how.device)
    outputs = kind.outputs(called(model, fresh(x)))  # a teacher is asked about the same later
    try:
        value = kind.loss.batch(outputs, y)
    except PrunekitError:
        raise
    except Exception as error:  # labels that no batch which was tried beforehand had
        raise kind.cause(f"loss: {kind.loss.name}", outputs.detach(), y, error) from error
    counts, plain = part.counts(kind, y)
    if ranks.size() > 1:  # a mean over nothing is NaN
        value = value * counts[rank] if counts[rank] else outputs.sum() * 0
    if how.distill is not None:
        value = how.distill(value, outputs, x, y, plain[rank])
    return value, counts
