"""Which training samples a number of an explanation comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Batch
from prunekit.errors import PrunekitError, UsageError
from prunekit.explain.answers import label_of
from prunekit.explain.path import PHASES
from prunekit.explain.view import View
from prunekit.kernel import data_scores
from prunekit.kernel.datawise import check_data_scores
from prunekit.progress import Bar

STRONGEST = 12  # training samples named on either side


@dataclass(frozen=True)
class Training:
    """What the data-wise scores need of the training data: ``batch(indices)`` or ``batch(indices, seed)``, the mean loss.

    ``loss`` is a function ``(outputs, labels) -> scalar``, a ``prunekit.task.Loss``, or None for the task's own.
    """

    batch: Callable[..., Batch]
    loss: Any = None


def training_samples(
    view: View, weights: Tensor, mask: Tensor | None, training: Training | None, kernel: float
) -> dict[str, Any]:
    """The training samples that a number comes from, strongest first; ``note`` alone where they cannot be told.

    Args:
        weights: ``(1, samples, targets)``: the number is the weighted sum of the view's values.
        kernel: what the steps say that the gradients did to it; the samples' scores sum to the same.
    """
    if training is None:
        return {"note": "this run has no training data, so training samples cannot be told"}
    try:
        check_data_scores(view.trajectory)
    except PrunekitError as error:
        return {"note": str(error)}
    steps = len(view.trajectory)
    edges = [round(k * steps / min(PHASES, steps)) for k in range(min(PHASES, steps) + 1)]
    when: dict[int, list[float]] = {}

    def each(step: int, indices: Tensor, given: Tensor) -> None:
        phase = next(k for k, end in enumerate(edges[1:]) if step < end)
        for k, score in zip(indices.tolist(), given[:, 0, 0].tolist(), strict=True):
            when.setdefault(k, [0.0] * (len(edges) - 1))[phase] += score

    with Bar("training samples (steps)", steps) as bar:
        try:
            found = data_scores(
                view.function, view.trajectory, view.x, view.y, training.batch, training.loss, aggregate=weights, only=mask,
                nodes=view.nodes, rule=view.rule, each=each, tick=bar.advance,
            )  # fmt: skip
        except UsageError as error:  # a loss that mixes its batch
            return {"note": str(error)}
    scores = found.scores[:, 0, 0].double().cpu()
    order = scores.argsort(descending=True).tolist()
    raised = [k for k in order[:STRONGEST] if scores[k] > 0]
    lowered = [k for k in order[::-1][:STRONGEST] if scores[k] < 0]
    return {
        "seen": int((scores != 0).sum()),
        "sum": float(scores.sum()),
        "momentum": float(found.momentum.sum()),
        "difference_to_steps": float(scores.sum()) + float(found.momentum.sum()) - kernel,
        "edges": edges,
        "raised": _named(raised, scores, training, when, edges),
        "lowered": _named(lowered, scores, training, when, edges),
    }


def _named(
    indices: list[int], scores: Tensor, training: Training, when: Mapping[int, list[float]], edges: Sequence[int]
) -> list[dict[str, Any]]:
    """Training samples by name: what each gave in every stretch of training, and the stretch in which it gave most."""
    labels = training.batch(torch.tensor(indices))[1] if indices else None
    found = []
    for place, k in enumerate(indices):
        sign = 1 if scores[k] > 0 else -1
        most = max(range(len(when[k])), key=lambda phase: sign * when[k][phase])
        found.append(
            {"index": k, "label": label_of(labels, place, len(indices)), "score": float(scores[k]), "phases": when[k],
             "mostly": {"begin": edges[most], "end": edges[most + 1]}}
        )  # fmt: skip
    return found
