"""compress --dry-run: what would be done, what it would take in time, memory and disk, and what would stay whole."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.criteria import get_criterion, parse, score
from prunekit.data import Samples, Split
from prunekit.layerwise import prune_layerwise
from prunekit.measure.size import in_memory
from prunekit.plan import GROUPED, MissedTarget, choices, make_plan
from prunekit.recipe import DROPS, SIZED, TIMES, Prune, Recipe, parse_seconds
from prunekit.search.budget import TRIES
from prunekit.structure import asked_sparsity, implied_sparsity, prunable_parameters
from prunekit.task import Task
from prunekit.task.evaluation import evaluate
from prunekit.trajectory import Layout, Trajectory
from prunekit.verbs.checks import settled, try_once, with_task
from prunekit.verbs.compress import criteria_of
from prunekit.verbs.run_folder import load_splits

FEW = 4
"""Samples that a gradient is timed with; a forward pass is timed with as many as one batch of validation data, 32 at most."""
MOST = 32
SINGLE = 4
"""Bytes of a number in single precision, in which scores and gradients are."""
BY_LAYERS = 4
"""Forward passes that a layer-wise method takes of each of its samples, its sums and solutions among them, about."""
TIMING = 3.0
"""Seconds that ``eval`` times passes for, at each of the recipe's sizes of a batch, at most about."""


def foresee(recipe: Recipe, folders: Sequence[Path], out: Path, criteria: Sequence[str]) -> dict[str, Any]:
    """Reads model and data, tries and times them on a few samples, and plans by magnitude; writes nothing into ``out``.

    Returns:
        ``model``, ``parameters``, ``task``, ``samples`` by split, ``criteria``; ``seconds`` by verb, of which ``at_most`` names
        those that are limits; ``memory`` and ``disk`` in bytes; ``whole``: what cannot be cut.

    Raises:
        StructureError: the model does not take the structure.
        PrunekitError: what ``compress`` would refuse of model and data.
    """
    recipe = with_task(recipe)
    begun = time.perf_counter()
    model = recipe.build_model()
    reading = time.perf_counter() - begun
    splits = load_splits(recipe)
    recipe = settled(recipe, model, splits)
    try_once(recipe, model, splits, training=False)
    task = recipe.load_task()
    (wanted,) = recipe.prune
    names = criteria_of(task, len(folders) > 1, criteria)
    pruned_away = prunable_parameters(model, Layout.of(model), recipe.prunable.ignore, recipe.prunable.include)
    sizes = {entry.name: entry.size for entry in Layout.of(model).parameters}
    prunable = sum(sizes[name] for name in pruned_away)
    plan = _planned(recipe, model, splits, wanted)
    kept = {name: count for name, count in sizes.items() if name not in pruned_away}
    budgeted = wanted.sparsity is None and implied_sparsity(wanted.structure) is None
    return {
        "model": type(model).__name__,
        "parameters": sum(sizes.values()),
        "task": task.name,
        "samples": {name: len(split) for name, split in splits.items()},
        "criteria": names,
        "seconds": _seconds(recipe, model, splits, task, wanted, names, len(folders), reading),
        "at_most": ["prune"] if wanted.repair is not None or budgeted else [],
        "memory": _memory(model, prunable, len(names)),
        "disk": _disk(model, prunable, names, len(folders), out),
        "whole": {
            "parameters": sum(kept.values()),
            "names": list(kept),
            "refused": dict(plan.provenance.get("refused", {})),
            "missed": None if budgeted else plan.missed,
            "removed": None if budgeted else plan.sparsity(),
        },
    }


def _planned(recipe: Recipe, model: nn.Module, splits: dict[str, Split], wanted: Prune) -> Any:
    """A plan by magnitude, of what is asked for; where a budget decides, of half."""
    if wanted.layerwise is not None:
        few, kept = splits["train"].samples().first(1), recipe.prunable
        return prune_layerwise(
            model, few, method="magnitude", sparsity=wanted.sparsity, structure=wanted.structure, ignore=kept.ignore,
            include=kept.include, task=recipe.load_task(),
        )[0]  # fmt: skip
    share = 0.5 if wanted.budget[0] else asked_sparsity(wanted.structure, wanted.sparsity)
    example = splits["validation"].batch(range(min(2, len(splits["validation"]))))[0]
    kept = recipe.prunable
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=kept.ignore, include=kept.include)
    sizes = {key: value for key in ("round_to", "min_units") if (value := getattr(wanted, key)) is not None}
    sizes |= {"uniform": True} if wanted.uniform else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)  # which is told among what stays whole
        return make_plan(
            scores, model, example if wanted.structure in GROUPED else None, sparsity=share, structure=wanted.structure,
            allocation=wanted.allocation or "global", attention=recipe.structure.mappings(), **sizes,
        )  # fmt: skip


def _seconds(
    recipe: Recipe,
    model: nn.Module,
    splits: dict[str, Split],
    task: Task,
    wanted: Prune,
    names: Sequence[str],
    states: int,
    reading: float,
) -> dict[str, float]:
    """By verb: the time of a pass or a gradient of one sample, times how many there are."""
    scoring = min(len(splits["scoring"]), recipe.score.samples)
    some = splits["validation"].samples(MOST).first(MOST)
    forward = _timed(lambda: evaluate(model, some, task)) / len(some)
    few = splits["scoring"].samples(FEW).first(FEW)
    gradients = [_gradient(model, few, task, name, states) / len(few) for name in names]
    cells = len(choices(wanted.structure, recipe.compare.allocations, recipe.compare.sparsities)) * len(names)
    rebuilt = min(len(splits["test"]), recipe.eval.samples)
    validation, test = len(splits["validation"]) * forward, len(splits["test"]) * forward
    refining = wanted.repair is not None and wanted.repair.budget is not None
    pruning = 2 * validation + (parse_seconds(str(wanted.repair.budget)) if refining and wanted.repair else 0.0)
    if wanted.layerwise is not None:
        pruning += BY_LAYERS * min(len(splits["train"]), wanted.layerwise.samples) * forward
    if wanted.budget[0] in DROPS:
        pruning += TRIES * (cells / len(recipe.compare.sparsities) + 1) * validation
    elif wanted.budget[0] in SIZED:
        pruning += TRIES * (forward + (TIMING if wanted.budget[0] in TIMES else 0.0))
    return {
        "import": 2 * reading * states,
        "score": sum(gradients) * scoring,
        "compare": (cells + 1) * validation,
        "prune": pruning,
        "eval": 2 * test + TIMING * len(recipe.eval.latency_batches) + (states > 1) * rebuilt * max(gradients),
        "report": 1.0,
        "export": 2 * reading,
    }


def _gradient(model: nn.Module, few: Samples, task: Task, name: str, states: int) -> float:
    """Seconds that a criterion takes for a few samples; of one that looks at a path, one piece's times the pieces."""
    found, here = 0.0, Trajectory.of(model)
    for part in parse(name).singles:
        criterion = get_criterion(part.text)
        text = f"taylor(target={task.target})" if criterion.needs_path and criterion.needs_data else part.text
        pieces = max(1, states - 1) if criterion.needs_path else 1
        if not criterion.needs_path or criterion.needs_data:
            took = [score(here, model, few, criterion=text, task=task).cost["seconds"] for _ in range(2)]  # the first warms up
            found += pieces * float(min(took))
    return found


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the second call: the first also warms up."""
    work()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _memory(model: nn.Module, prunable: int, criteria: int) -> dict[str, int]:
    """Bytes: the dense model and a pruned one; in single precision the path's state and a gradient; scores and masks."""
    total = Layout.of(model).total
    found = {
        "models": 2 * in_memory(model),
        "gradients": 2 * SINGLE * total,
        "scores": (criteria + 4) * SINGLE * prunable,  # four of refining: a mask that is learnt, its gradient, Adam's two moments
    }
    return {**found, "all": sum(found.values())}


def _disk(model: nn.Module, prunable: int, names: Sequence[str], states: int, out: Path) -> dict[str, int]:
    """Bytes: weights of the path, scores by criterion, the pruned model with masks and plan, and the model in ``out``."""
    found = {
        "run": SINGLE * Layout.of(model).total * states + SINGLE * prunable * len(names) + in_memory(model) + 2 * prunable,
        "model": in_memory(model),
    }
    here = next(place for place in [out, *out.absolute().parents] if place.exists())
    return {**found, "all": sum(found.values()), "free": shutil.disk_usage(here).free}
