"""At which rate pruned weights are tuned, where nobody says: by their divergence from the dense model, or by their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunekit import ranks
from prunekit.batch import to
from prunekit.data import Samples
from prunekit.errors import UsageError
from prunekit.task import Task
from prunekit.task.evaluation import References, evaluate, fitting, run
from prunekit.training.line_search import Watcher, best_length
from prunekit.trajectory.bare import bare


class ByDivergence:
    """How far a model is from the dense one, by the first measure of its task's that says so: of classes KL in nats.

    Args:
        dense: the model that the divergence is from.
        samples: on which it is measured; none of the training's, where there are others.

    Raises:
        UsageError: the task has no such measure (``fits``).
    """

    floor = 0.0

    def __init__(self, dense: nn.Module, samples: Samples, task: Task) -> None:
        self._dense, self._samples, self._task = dense, samples, task
        self._references: References | None = None
        if not self.fits(task):
            raise UsageError(f"a rate by divergence needs a measure of distance to the dense model; task {task.name} has none")

    @staticmethod
    def fits(task: Task) -> bool:
        """Whether a task measures how far two models' outputs are from each other."""
        return any(measure.better == "lower" for measure in task.closeness)

    def __call__(self, model: nn.Module) -> float:
        if self._references is None:
            self._references = References(self._dense, self._samples, self._task)
        found = evaluate(model, self._samples, self._task, self._references).figures()
        return next(found[measure.name] for measure in self._task.closeness if measure.better == "lower")


class ByLoss:
    """How well a model does by the loss of its task: the mean over samples, or over what else the loss counts.

    Args:
        samples: on which it is measured; none of the training's, where there are others.

    Raises:
        UsageError: when called, no sample has a label that the loss counts.
    """

    floor = -math.inf

    def __init__(self, samples: Samples, task: Task) -> None:
        self._samples, self._task = samples, task
        self._fitting: Samples | None = None

    def __call__(self, model: nn.Module) -> float:
        if self._fitting is None:
            self._fitting = fitting(model, self._samples, self._task)
        total = counted = 0.0
        for batch in self._fitting.dealt():
            outputs = run(model, batch, self._task)
            labels = to(batch, outputs.device)[1]
            weight = self._task.loss.counted(labels, len(outputs))
            if weight:  # of a batch without a label that counts the mean is 0 / 0
                total += weight * float(self._task.loss.batch(outputs, labels).detach())
                counted += weight
        total, counted = ranks.total(total), ranks.total(counted)
        if not counted:
            raise UsageError("a rate by the loss: none of the scoring samples has a label that counts; give --lr")
        return total / counted


def find_rate(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    train: Callable[[torch.optim.Optimizer], object],
    moved: Callable[[], object],
    far: ByDivergence | ByLoss,
) -> float:
    """Adam's rate at first, see ``prunekit.training.line_search``; the model is as before in the end.

    Beside model and gradients it takes 12 bytes a weight in single precision, before the optimizer has any of its own.

    Args:
        model: whose masks are in place.
        trained: what the optimizer moves: the model's parameters, or others that its weights follow from.
        train: takes a few steps of training with the optimizer that it is given, which moves nothing.
        moved: called after ``trained`` has changed, so that weights follow and masks are in place again.
        far: what a step is to make less.

    Raises:
        NonFiniteError: of ``train``.
    """
    own = bare(model)
    tensors = {id(tensor): tensor for tensor in (*trained, *own.parameters(), *own.buffers())}
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def put_back() -> None:
        for tensor, value in kept:
            tensor.copy_(value)

    devices = sorted({tensor.device.index for tensor in trained if tensor.device.type == "cuda"})
    watcher = Watcher(trained)
    with torch.random.fork_rng(devices=devices):
        train(watcher)
    watcher.zero_grad()
    direction = watcher.direction.finish()
    with torch.no_grad():
        put_back()

    @torch.no_grad()
    def at(length: float) -> float:
        for parameter in trained:
            if parameter in direction:
                parameter.sub_(direction[parameter], alpha=length)
        moved()
        found = far(model)
        put_back()
        moved()  # what follows from them, whose own values are put back after
        put_back()
        return found

    return best_length(at, floor=far.floor)
