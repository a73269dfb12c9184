"""A run's validation data: the figure that choices go by, and what a pruned model loses there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import nn

from prunekit.measure import Lost
from prunekit.steps.by_schedule import Figure
from prunekit.task.evaluation import Evaluation, References, compared, evaluate
from prunekit.verbs.run_folder import Run


class Validation:
    """Models on the run's validation data; the dense one is measured once, when it is first compared with."""

    def __init__(self, run: Run) -> None:
        self._model, self._task, self._samples = run.model, run.task, run.batches("validation")
        self._references = None if run.task.measures else References(run.model, self._samples, run.task)
        name = run.task.deciding.name
        self.figure = Figure(name, lambda model: self.evaluation(model).figures()[name])

    def lost(self, pruned: nn.Module) -> Lost:
        return compared(self.evaluation(pruned), self.dense)

    @cached_property
    def dense(self) -> Evaluation:
        return self.evaluation(self._model)

    def evaluation(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self._samples, self._task, self._references)


def validation_of(run: Run) -> Validation | None:
    """None for a run without data."""
    return Validation(run) if run.recipe.data is not None else None


def validation_in(facts: Mapping[str, Any], measure: str) -> Lost | None:
    """What a pruned model's manifest says of validation data; older ones tell the figure alone."""
    if "validation" in facts:
        found: Lost = facts["validation"]
        return found
    figure = facts.get(f"validation_{measure}")
    return None if figure is None else {"pruned": figure}
