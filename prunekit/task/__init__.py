"""What a model is for: a plain dict from name to task, one entry function.

A new task is one file with a subclass of ``Task`` and one line in ``TASKS``; a user's own comes by import path, an installed
package's by entry point (``prunekit.tasks``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels
from prunekit.errors import UsageError, nearest, theirs
from prunekit.measure.measure import Measure
from prunekit.registry import Registry
from prunekit.task.binary import Binary, MultiLabel
from prunekit.task.classification import Classification
from prunekit.task.heads import Heads, Unlabelled
from prunekit.task.losses import Loss, as_loss
from prunekit.task.places import CausalLM, LanguageModel, MaskedLM, Places, Segmentation, Seq2SeqLM, TokenClassification
from prunekit.task.regression import Regression
from prunekit.task.task import TARGET_NAMES, Target, Task

__all__ = [
    "TARGET_NAMES", "TASKS", "Binary", "CausalLM", "Classification", "Heads", "Loss", "MaskedLM", "Measure", "MultiLabel",
    "Places", "Regression", "Segmentation", "Seq2SeqLM", "Target", "Task", "TokenClassification", "Unlabelled", "as_loss",
    "get_task", "guess_task",
]  # fmt: skip


def as_task(found: Any, name: str) -> Callable[..., Task]:
    """What makes a user's task: a class, a function, or a task that is made already. Raises UsageError for anything else."""

    def make(loss: Any = None, **options: Any) -> Task:
        made = found
        if not isinstance(found, Task) or options:
            with theirs(f"task: {name}"):
                made = found(**options)
        if not isinstance(made, Task):
            raise UsageError(f"task: {name} gave a {type(made).__name__}, not a prunekit.Task")
        return made if loss is None else made.with_loss(loss)

    return make


TASKS: Registry[Callable[..., Task]] = Registry(
    "task",
    "prunekit.tasks",
    as_task,
    {
        "classification": Classification,
        "binary": Binary,
        "multi_label": MultiLabel,
        "regression": Regression,
        "segmentation": Segmentation,
        "token_classification": TokenClassification,
        "causal_lm": CausalLM,
        "masked_lm": MaskedLM,
        "seq2seq": Seq2SeqLM,
        "heads": Heads,
        "unlabelled": Unlabelled,
    },
)


def get_task(task: str | Task | None, loss: Any = None, **options: Any) -> Task:
    """A task by its name, or by ``module:task``; a task is taken as it is, None is classification.

    Args:
        loss: instead of the task's own.
        options: of the task, such as ``class_weights``.

    Raises:
        UsageError: there is no task of that name, or an option that it does not take.
    """
    if isinstance(task, Task):
        return task if loss is None else task.with_loss(loss)
    name = task or "classification"
    if not TASKS.is_own(name):
        return TASKS[name](loss=loss, **options)
    known = _options(TASKS[name])
    for option in options:
        if option not in known:
            raise UsageError(f"task {name}: has no option {option!r}; {nearest(option, known)}")
    return TASKS[name](loss=loss, **options)


def _options(task: Callable[..., Task]) -> list[str]:
    """Every option that a task takes, those of its bases too."""
    classes = inspect.getmro(task) if inspect.isclass(task) else (task,)
    found = [n for c in classes if "__init__" in vars(c) for n in inspect.signature(c).parameters]
    fixed = {"self", "loss", "options", "args", "kwargs"}
    if issubclass(task, LanguageModel):  # type: ignore[arg-type]
        fixed.add("class_axis")
    return sorted(set(found) - fixed)


def guess_task(outputs: Tensor, labels: Labels, given_loss: bool, inputs: Inputs = None) -> str:
    """The task that nobody named, where outputs and labels leave no doubt.

    Args:
        given_loss: whether the user named a loss.
        inputs: what the outputs were computed from.

    Raises:
        UsageError: they leave doubt; names the tasks that fit.
    """
    if labels is None:
        return "unlabelled"
    if not isinstance(labels, Tensor):
        raise UsageError(f"labels are {type(labels).__name__}; name the task (task: heads, or module:task of your own)")
    if labels.dtype == torch.bool:
        _doubt("binary or multi_label", "true and false")
    if not labels.is_floating_point():
        tokens = outputs.dim() == 3 and labels.dim() == 2
        if tokens and isinstance(inputs, Mapping) and not given_loss:
            raise UsageError(
                "a class for every token can be token_classification, causal_lm, masked_lm or seq2seq; name the task "
                "(--task of import, task: in a recipe, task= in Python)"
            )
        return "classification"
    if labels.numel() != outputs.numel() and not given_loss:
        return "classification"  # whose check says what it needs
    soft = labels.shape == outputs.shape and bool((labels >= 0).all()) and torch.allclose(labels.sum(-1), labels.new_ones(()))
    if soft and not given_loss and outputs.dim() == 2 and outputs.shape[1] > 1:
        return "classification"
    if bool(((labels == 0) | (labels == 1)).all()):
        if labels.numel() == len(labels):
            return _doubt("binary or regression")
        return _doubt("multi_label, regression" + (" or classification (soft labels)" if soft else ""))
    return "regression"


def _doubt(names: str, what: str = "floating-point zeros and ones") -> str:
    raise UsageError(f"labels are {what}; name the task (task: {names})")
