"""Which task it is, and its samples: named by the user, or seen from one batch where that leaves no doubt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prunekit.batch import Inputs, size, taken
from prunekit.data import Samples
from prunekit.errors import PrunekitError, UsageError
from prunekit.task import Task, get_task, guess_task
from prunekit.task.evaluation import run, unfit


def settle(model: nn.Module, batches: Any, task: str | Task | None, loss: Any = None) -> tuple[Task, Samples | None]:
    """The task, and the samples as it takes them; None for no samples.

    Args:
        model: run on two samples where ``task`` is None.
        batches: as ``Samples.of`` takes them; an empty sequence for none.

    Raises:
        UsageError: no task is named and the samples leave doubt, or its outputs and labels do not fit each other.
    """
    kind = get_task(task, loss)
    if isinstance(batches, tuple | list) and not batches:
        return kind, None
    samples = Samples.of(batches, kind.batch)
    if not len(samples):
        raise UsageError("batches hold no samples")
    if task is None:
        name = guess(model, samples, kind, loss is not None)
        if name != kind.name:
            kind = get_task(name, loss)
    return kind, samples


def guess(model: nn.Module, samples: Samples, kind: Task, given_loss: bool) -> str:
    """The name of the task that two samples show; see ``guess_task``."""
    first = samples.batch(0)
    few = taken(first, slice(0, min(2, size(first[0]))))
    return guess_task(outputs_of(model, few[0], kind), few[1], given_loss, few[0])


def outputs_of(model: nn.Module, inputs: Inputs, kind: Task) -> Tensor:
    """The outputs that count of a few samples.

    Raises:
        UsageError: the model does not take the inputs; says which it got.
    """
    try:
        return run(model, (inputs, None), kind)
    except PrunekitError:
        raise
    except Exception as error:  # the user's own model and data
        raise unfit(type(model).__name__, inputs, error) from error
