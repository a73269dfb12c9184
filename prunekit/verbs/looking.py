"""The samples that explain looks at, and the number that it explains of them: a split's first, some by number, the errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.batch import Inputs, Labels
from prunekit.errors import StructureError, UsageError
from prunekit.explain import Errors, View, ask, find_errors
from prunekit.explain.asked import needs_others
from prunekit.explain.part import UNITS_OF
from prunekit.explain.ranking import Units
from prunekit.kernel import ModelFunction
from prunekit.structure import find_groups
from prunekit.verbs.run_folder import Run

ERRORS = "errors"
EVALUATIONS = 64  # nodes along the whole path at least
Chosen = int | str | Sequence[int] | None
"""How many samples at most, ``errors``, or their numbers."""


def view_of(run: Run, split: str, samples: int | None = None, nodes: int | None = None) -> View:
    """The run's model looked at on the first ``samples`` of a split; ``eval.samples`` by default."""
    found = run.batches(split, samples or run.looked_at)
    return _looking(run, *found.rows(0, len(found)), nodes)


def errors_of(run: Run, split: str) -> Errors:
    """The samples of a split that the trained model is wrong on."""
    layout, path = run.trajectory.layout, run.trajectory
    function = ModelFunction(run.model, layout, path.fixed, run.task.target, run.device, task=run.task)
    return find_errors(function, path.state(-1), run.batches(split))


def chosen_view(
    run: Run,
    split: str,
    chosen: Chosen = None,
    target: str | None = None,
    nodes: int | None = None,
    position: int | None = None,
) -> tuple[View, dict[str, Any]]:
    """The view of some samples and a target, and what the result says of the choice.

    Of errors the ``eval.samples`` most wrong are looked at. A loss is compared with the mean of the
    split's first ``eval.samples``.

    Raises:
        UsageError: a number or the target does not exist, or the model makes no error.
    """
    if chosen is None or isinstance(chosen, int):
        view = view_of(run, split, chosen, nodes)
        return (view if target is None and position is None else ask(view, target, position=position)), {}
    if isinstance(chosen, str):
        found = errors_of(run, split)
        if not found.wrong:
            raise UsageError(f"--samples {ERRORS}: the model is right on all {found.samples} {split} samples")
        indices = found.indices[: run.looked_at]
        told: dict[str, Any] = {"samples": ERRORS, "of": found.wrong, "indices": indices}
    else:
        indices = list(chosen)
        size = len(run.splits[split])
        if missing := next((k for k in indices if not 0 <= k < size), None):
            raise UsageError(f"--samples: {split} sample {missing} does not exist; there are {size}, numbered 0 to {size - 1}")
        if len(set(indices)) < len(indices):
            raise UsageError(f"--samples: {','.join(map(str, indices))} has a number twice")
        told = {"samples": ",".join(map(str, indices)), "of": len(indices), "indices": indices}
    return numbered_view(run, split, indices, target, nodes, position), {"chosen": told}


def numbered_view(
    run: Run, split: str, indices: Sequence[int], target: str | None, nodes: int | None, position: int | None = None
) -> View:
    """The run's model looked at on the samples of these numbers, asked for a target (``prunekit.explain.ask``)."""
    view = _looking(run, *run.splits[split].batch(indices), nodes)
    if needs_others(view, target, position):
        others = range(min(run.looked_at, len(run.splits[split])))
        view = _looking(run, *run.splits[split].batch([*indices, *others]), nodes)
    return ask(view, target, len(indices), position)


def units_of_run(run: Run) -> Units:
    """The model's channels and heads, or why it has none that stand alone."""
    found = {}
    for kind, structure in UNITS_OF.items():
        try:
            found[kind] = find_groups(structure, run.model, run.example, run.recipe.structure.mappings())
        except StructureError as error:
            found[kind] = str(error)  # type: ignore[assignment]
    return found


def _looking(run: Run, x: Inputs, y: Labels, nodes: int | None) -> View:
    """One node a step, more where a path of few pieces takes long ones."""
    options = run.recipe.eval
    pieces = -(-run.trajectory.pieces // options.stride)
    chosen = nodes or max(1, -(-EVALUATIONS // pieces))
    return View.of(run.model, run.trajectory, x, y, run.device, run.task, nodes=chosen, rule=options.rule, stride=options.stride)
