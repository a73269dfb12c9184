"""A training step whose batch several ranks share: which samples each has, and what its mean loss counts in the batch's.

The batch is the same samples in the same order however many ranks there are. Each has its stretch of them as a micro-batch; the
gradient is the weighted mean of theirs, which ``DistributedDataParallel`` takes. What mixes a batch (BatchNorm) sees one
micro-batch, and its running statistics are the first rank's. Random numbers of rank 0 come from where a process alone has them,
those of another rank from a seed of its own.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Labels
from prunekit.task import Task
from prunekit.training.augment import step_seed
from prunekit.trajectory import Recorder


@contextmanager
def shared(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """The model to call in the loop's place: gradients that its backward pass leaves are the mean over ranks.

    A process alone gets the model itself. In the end all ranks have the same buffers and random state.
    """
    if ranks.size() == 1:
        yield model
        return
    with ranks.carrying() as group:
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    if not ranks.first():
        torch.manual_seed(_seed(f"{seed}"))
    yield wrapped
    del wrapped
    gc.collect()  # its hooks on the parameters go with it
    held = dict(model.named_buffers())
    with torch.no_grad():
        for name, found in ranks.same(held).items():
            held[name].copy_(found)
    torch.set_rng_state(ranks.same({"": torch.get_rng_state()})[""])


def _seed(text: str, rank: int | None = None) -> int:
    return random.Random(f"{text} rank {ranks.rank() if rank is None else rank}").getrandbits(62)


@dataclass(frozen=True)
class Part:
    """A rank's part of a step.

    Attributes:
        batch: indices of all samples of the step.
        own: those of this rank; of one that has none the batch's first, which counts nothing.
        seeds: by rank, what augmentation is drawn from.
    """

    batch: Tensor
    own: Tensor
    seeds: list[int]

    @classmethod
    def of(cls, batch: Tensor, seed: int, step: int) -> Part:
        own = ranks.stretch(len(batch))
        whole = step_seed(seed, step)
        seeds = [whole, *(_seed(f"{whole}", rank) for rank in range(1, ranks.size()))]
        return cls(batch, batch[own.start : own.stop] if own else batch[:1], seeds)

    def counts(self, task: Task, labels: Labels) -> tuple[list[float], list[float]]:
        """By rank, what a mean over its samples counts in one over all: of the loss, which may weigh samples, and of any other.

        Args:
            labels: of this rank's samples.
        """
        many = range(ranks.size())
        plain = [len(ranks.stretch(len(self.batch), rank)) / len(self.batch) for rank in many]
        if ranks.size() == 1 or task.loss.weights is None:
            return plain, plain
        weights = torch.zeros(ranks.size(), dtype=torch.float64)
        if plain[ranks.rank()]:
            weights[ranks.rank()] = task.loss.weights(labels).double().sum().cpu()
        ranks.add_up([weights])
        return (weights / weights.sum()).tolist() if weights.sum() > 0 else plain, plain

    def note(self, recorder: Recorder, counts: list[float], augmented: bool) -> None:
        """Records this rank's micro-batch, with what it counts; the recorder adds the others'."""
        weight = counts[ranks.rank()] * ranks.size() if ranks.size() > 1 else None
        recorder.batch(self.own, self.seeds[ranks.rank()] if augmented else None, weight)
