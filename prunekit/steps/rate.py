"""At which rate pruned weights are tuned by their divergence from the dense model, where nobody says."""

from __future__ import annotations

import math

from torch import nn

from prunekit.data import Samples
from prunekit.task import Task
from prunekit.task.evaluation import References, evaluate

MOST, NEAR = 5e-3, 0.005
"""The rate at most; and times √KL where tuning starts, since large steps harm what is nearly right (docs/language-models.md)."""


class ByDivergence:
    """A rate for Adam's steps: ``0.005 √KL`` of the model that tuning starts from, 5e-3 at most, or where a task has no KL.

    Args:
        dense: the model that the divergence is from.
        samples: on which it is measured; none of the training's, where there are others.
    """

    def __init__(self, dense: nn.Module, samples: Samples, task: Task) -> None:
        self._dense, self._samples, self._task = dense, samples, task
        self._references: References | None = None

    def __call__(self, model: nn.Module) -> float:
        if self._references is None:
            self._references = References(self._dense, self._samples, self._task)
        found = evaluate(model, self._samples, self._task, self._references).figures()
        return min(MOST, NEAR * math.sqrt(max(0.0, found.get("kl", math.inf))))
