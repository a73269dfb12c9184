"""Which samples a model is wrong on, most wrong first: by the margin of its answer, or by the loss where there are no classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels, size, to
from prunekit.data import Samples
from prunekit.errors import NonFiniteError, UsageError
from prunekit.explain.answers import answers_of, class_labels, class_outputs, label_of, outputs_at
from prunekit.explain.path import SCHEMA
from prunekit.kernel import ModelFunction

LISTED = 20  # errors that are named where nobody says how many


@dataclass(frozen=True)
class Errors:
    """The samples that a model is wrong on, most wrong first.

    Attributes:
        by: ``margin``, the answered class's output less the right one's; ``loss`` where there is not one class a sample.
        rows: ``index``, ``label``, ``answer``, and ``margin`` or ``loss`` (then ``above``, what it is above the mean): of every
            misclassified sample, or of every sample.
        wrong: how many are misclassified, or lose more than the mean.
        samples: how many were looked at; labels that do not count are left out.
        mean: the mean loss of all of them; None for classes.
    """

    by: str
    rows: list[dict[str, Any]]
    wrong: int
    samples: int
    mean: float | None

    @property
    def indices(self) -> list[int]:
        """The numbers of those that are wrong, most wrong first."""
        return [row["index"] for row in self.rows[: self.wrong]]


def find_errors(function: ModelFunction, state: Tensor, samples: Samples) -> Errors:
    """Runs the model at ``state`` ``(P,)`` on all samples.

    Raises:
        UsageError: the task has neither classes nor a loss, or labels do not fit it.
        NonFiniteError: an output is NaN or infinite.
    """
    task, rows, by = function.task, [], "margin"
    numbers = [int(i) for group in samples.groups for i in group]
    count = begin = 0
    for x, y in samples:
        x, y = to(x, function.device), to(y, function.device)
        outputs = outputs_at(function, state, x, y)
        where = numbers[begin : begin + size(x)]
        begin += size(x)
        if not bool(outputs.isfinite().all()):
            finite = outputs.reshape(len(outputs), -1).isfinite().all(1)
            raise NonFiniteError(
                f"sample {where[int((~finite).nonzero()[0])]}: the model's output is not finite, so no error is told"
            )
        classes = class_labels(task, outputs, y)
        if classes is None:
            by = "loss"
            rows += _by_loss(function, outputs, x, y, where)
            count += len(where)
        else:
            task.check(outputs, y, "samples looked at")
            found, counted = _by_margin(class_outputs(task, outputs), classes, getattr(task, "ignore_index", None), where)
            rows += found
            count += counted
    mean = sum(row["loss"] for row in rows) / max(1, count) if by == "loss" else None
    rows.sort(key=lambda row: (-row[by], row["index"]))
    if mean is not None:
        rows = [{**row, "above": row["loss"] - mean} for row in rows]
    wrong = len(rows) if mean is None else sum(row["above"] > 0 for row in rows)
    return Errors(by, rows, wrong, count, mean)


def explain_errors(errors: Errors, limit: int = LISTED) -> dict[str, Any]:
    """The first ``limit`` errors as an explanation's JSON values."""
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "errors",
        "name": "",
        "index": "",
        "title": "misclassified samples" if errors.by == "margin" else "samples by loss",
        "by": errors.by,
        "samples": errors.samples,
        "errors": errors.wrong,
        **({} if errors.mean is None else {"mean": errors.mean}),
        "rows": errors.rows[:limit],
    }


def _by_margin(outputs: Tensor, labels: Tensor, ignored: int | None, where: Sequence[int]) -> tuple[list[dict[str, Any]], int]:
    """Rows of the misclassified samples, and how many samples count."""
    counts = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
    answers = outputs.argmax(1)
    own = outputs.gather(1, labels.masked_fill(~counts, 0)[:, None])[:, 0]
    margins = (outputs.gather(1, answers[:, None])[:, 0] - own).double().tolist()
    wrong = ((answers != labels) & counts).tolist()
    rows = [
        {"index": where[k], "label": int(labels[k]), "answer": int(answers[k]), "margin": margins[k]}
        for k in range(len(where))
        if wrong[k]
    ]
    return rows, int(counts.sum())


def _by_loss(function: ModelFunction, outputs: Tensor, x: Inputs, y: Labels, where: Sequence[int]) -> list[dict[str, Any]]:
    task = function.task
    if "loss" not in task.targets():
        raise UsageError(f"errors: the task {task.name} has neither classes nor a loss of its own, so no sample is wrong by any")
    task.check(outputs, y, "samples looked at")
    with torch.no_grad():
        losses = task.get_target("loss")(outputs, y)[:, 0].double().tolist()
    answers = answers_of(task, outputs, y)
    return [
        {"index": where[k], "label": label_of(y, k, size(x)), "answer": answers[k], "loss": losses[k]} for k in range(len(where))
    ]
