"""compress --dry-run: what would be done, what it would take in time, memory and disk, and what would stay whole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.apply import prune
from prunekit.cost import Machine, Shape, Work, gradients, learn, score_path, tune
from prunekit.cost import evaluate as evaluated
from prunekit.cost.model import SINGLE
from prunekit.criteria import gather, get_criterion, parse
from prunekit.data import Split
from prunekit.errors import theirs
from prunekit.exporting.hf import saying_of
from prunekit.huggingface import quietly
from prunekit.kernel import targets_of
from prunekit.kernel.attribution import MEMORY
from prunekit.layerwise import prune_layerwise
from prunekit.measure.size import in_memory
from prunekit.plan import Plan, choices
from prunekit.recipe import DROPS, SIZED, TIMES, Prune, Recipe, parse_seconds
from prunekit.repair.stream import Stream
from prunekit.repair.streamed import Streaming
from prunekit.repair.track import STATES
from prunekit.search.budget import TRIES
from prunekit.structure import asked_sparsity, implied_sparsity, prunable_parameters
from prunekit.task import Task
from prunekit.training import batches_per_epoch
from prunekit.trajectory import Layout, Trajectory, room_for
from prunekit.verbs.budgets import plan_by_magnitude
from prunekit.verbs.checks import settled, try_once, with_task
from prunekit.verbs.compensating import SAMPLES
from prunekit.verbs.compress import check_model, criteria_of
from prunekit.verbs.dividing import REFITTED, menu
from prunekit.verbs.evaluating import CHORDS
from prunekit.verbs.run_folder import explained, load_splits

FEW = 4
"""Samples, at most, that passes are timed with, and with one alone."""
BY_LAYERS = 4
"""Forward passes that a layer-wise method or compensation takes of a sample, its sums and solutions among them, about."""
TIMING = 3.0
"""Seconds that ``eval`` times passes for, at each of the recipe's sizes of a batch, at most about."""


def foresee(recipe: Recipe, folders: Sequence[Path], out: Path, criteria: Sequence[str]) -> dict[str, Any]:
    """Reads model and data, tries and times them on a few samples, and plans by magnitude; writes nothing into ``out``.

    Returns:
        ``model``, ``parameters``, ``task``, ``samples`` by split, ``criteria``; ``seconds`` by verb, of which ``at_most`` names
        those that are limits; ``memory`` and ``disk`` in bytes; ``no_config``: why no config says the smaller model's shapes;
        ``whole``: what cannot be cut.

    Raises:
        StructureError: the model does not take the structure.
        PrunekitError: what ``compress`` would refuse of model, data and budget.
    """
    recipe = with_task(recipe)
    begun = time.perf_counter()
    model = recipe.build_model()
    reading = time.perf_counter() - begun
    splits = load_splits(recipe)
    recipe = settled(recipe, model, splits)
    try_once(recipe, model, splits, training=False)
    check_model(recipe, model, splits)
    task = recipe.load_task()
    (wanted,) = recipe.prune
    names = criteria_of(task, len(folders) > 1, criteria)
    pruned_away = prunable_parameters(model, Layout.of(model), recipe.prunable.ignore, recipe.prunable.include)
    sizes = {entry.name: entry.size for entry in Layout.of(model).parameters}
    prunable = sum(sizes[name] for name in pruned_away)
    plan = _planned(recipe, model, splits, wanted)
    kept = {name: count for name, count in sizes.items() if name not in pruned_away}
    shape = Shape.of(model, splits["validation"].batch(range(1))[0], prunable)
    machine = _machine(shape, model, splits, task)
    recorded = _states_recorded(recipe, splits, wanted)
    works = _works(recipe, shape, model, splits, task, wanted, names, len(folders), recorded)
    limited = wanted.repair is not None and (wanted.repair.stream is None or wanted.repair.budget is not None)
    budgeted = wanted.sparsity is None and implied_sparsity(wanted.structure) is None
    return {
        "model": type(model).__name__,
        "parameters": sum(sizes.values()),
        "task": task.name,
        "samples": {name: len(split) for name, split in splits.items()},
        "criteria": names,
        "seconds": _seconds(recipe, works, shape, machine, wanted, len(folders), reading),
        "at_most": ["prune"] if limited or budgeted else [],
        "memory": _memory(model, works),
        "disk": _disk(model, prunable, names, len(folders) + recorded, out),
        "no_config": _no_config(model, plan, splits),
        "whole": {
            "parameters": sum(kept.values()),
            "names": list(kept),
            "refused": dict(plan.provenance.get("refused", {})),
            "missed": None if budgeted else plan.missed,
            "removed": None if budgeted else plan.sparsity(),
        },
    }


def _planned(recipe: Recipe, model: nn.Module, splits: dict[str, Split], wanted: Prune) -> Plan:
    """A plan by magnitude, of what is asked for; where a budget decides, of half."""
    if wanted.layerwise is not None:
        few, kept = splits["train"].samples().first(1), recipe.prunable
        return prune_layerwise(
            model, few, method="magnitude", sparsity=wanted.sparsity, structure=wanted.structure, ignore=kept.ignore,
            include=kept.include, task=recipe.load_task(),
        )[0]  # fmt: skip
    share = 0.5 if wanted.budget[0] else asked_sparsity(wanted.structure, wanted.sparsity)
    example = splits["validation"].batch(range(min(2, len(splits["validation"]))))[0]
    return plan_by_magnitude(wanted, recipe, model, example, share)


def _no_config(model: nn.Module, plan: Plan, splits: dict[str, Split]) -> str:
    """Why no config of transformers would say the shapes of the plan's model; empty where one does."""
    if not plan.smaller:
        return ""
    with theirs("transformers"), quietly():
        return str(saying_of(prune(model, plan, splits["validation"].batch(range(1))[0]))[1])


def _machine(shape: Shape, model: nn.Module, splits: dict[str, Split], task: Task) -> Machine:
    """This machine's rates with this model, from forward passes of a batch and gradients of a few samples."""
    trajectory = Trajectory.of(model)
    function, few = gather(trajectory, model, splits["scoring"].samples(FEW).first(FEW), task=task).explained("loss")
    theta = trajectory.state(-1)

    def forward(samples: int) -> None:
        with torch.no_grad():
            function(theta, *few.rows(0, samples))

    def both(samples: int) -> None:
        function.gradient(theta, *few.rows(0, samples))

    return Machine.here(shape, forward, both, len(few))


def _works(
    recipe: Recipe, shape: Shape, model: nn.Module, splits: dict[str, Split], task: Task, wanted: Prune, names: Sequence[str],
    states: int, recorded: int,
) -> dict[str, Work]:  # fmt: skip
    """By verb, what goes through the model.

    Args:
        states: of the path.
        recorded: of training after pruning, which a path goes on along.
    """
    scoring = min(len(splits["scoring"]), recipe.score.samples)
    validation, test = (evaluated(shape, len(splits[name])) for name in ("validation", "test"))
    cells = len(choices(wanted.structure, recipe.compare.allocations, recipe.compare.sparsities)) * len(names)
    scores = Work()
    for part in dict.fromkeys(part.text for name in names for part in parse(name).singles):
        scores = scores.then(_scored(part, recipe, shape, model, splits, task, scoring, states))
    pruning = validation.times(2)
    if wanted.layerwise is not None:
        pruning = pruning.then(evaluated(shape, min(len(splits["train"]), wanted.layerwise.samples)).times(BY_LAYERS))
    made = _learnt(recipe, shape, splits, wanted, scoring)
    tried = 0 if wanted.tokens is None else sum(way in REFITTED.values() for way in menu(wanted))
    if refits := tried + 1 if tried else int(wanted.compensate):
        made = made.then(evaluated(shape, min(len(splits["train"]), SAMPLES)).times(refits * BY_LAYERS))
    pruning = pruning.then(made.times(TRIES + 1 if wanted.budget[0] in DROPS else 1))
    if wanted.budget[0] in DROPS:
        pruning = pruning.then(validation.times(TRIES * (cells / len(recipe.compare.sparsities) + 1)))
    elif wanted.budget[0] in SIZED:
        pruning = pruning.then(evaluated(shape, 1).times(TRIES))
    measuring = test.times(2)
    if states + recorded > 1:
        rebuilt = min(len(splits["test"]), explained(recipe, task))
        measuring = measuring.then(
            score_path(
                shape, samples=rebuilt, pieces=states - 1 + recorded if states > 1 else min(recorded, CHORDS), memory=MEMORY
            )
        )
    return {"score": scores, "compare": validation.times(cells + 1), "prune": pruning, "eval": measuring}


def _learnt(recipe: Recipe, shape: Shape, splits: dict[str, Split], wanted: Prune, judged: int) -> Work:
    """What training data are spent on: a mask, weights, or both in the same steps, of which the whole is learnt from once.

    A mask that is learnt for a given time is not among it.
    """
    train, batch = splits["train"].samples(), recipe.train.batch_size
    mask = None if wanted.repair is None or wanted.repair.budget is not None else wanted.repair.stream
    work, steps_of_weights = Work(), _steps_trained(recipe, splits, wanted)
    if mask is not None:
        steps = Stream(train, mask.batch).steps(mask.tokens, "refine")
        work = learn(
            shape, steps=steps, batch=mask.batch, judged=judged, looks=mask.looks, bytes_a_weight=10.0 if mask.lean else 16.0,
            checkpointing=mask.checkpointing,
        )  # fmt: skip
    if steps_of_weights:
        work = work.then(tune(shape, steps=steps_of_weights, batch=batch))
    if wanted.tokens is not None:
        both = Streaming(wanted.tokens)
        steps = Stream(train, both.batch).steps(wanted.tokens, "tokens")
        alone = tune(shape, steps=steps, batch=both.batch)
        work = learn(shape, steps=steps, batch=both.batch, judged=judged, looks=both.looks)
        work = work.then(replace(alone, forward=0.0, backward=0.0, forwards=0.0, backwards=0.0))  # one gradient moves both
    return work


def _steps_trained(recipe: Recipe, splits: dict[str, Split], wanted: Prune) -> int:
    """Steps that weights are trained for after pruning, whose states make up a child of the path."""
    asked, train = wanted.finetune, recipe.train
    if asked is None:
        return 0
    if asked.tokens is not None:
        return Stream(splits["train"].samples(), train.batch_size).steps(asked.tokens, "finetune")
    return int(asked.epochs or 0) * batches_per_epoch(len(splits["train"]), train.batch_size, train.drop_last)


def _states_recorded(recipe: Recipe, splits: dict[str, Split], wanted: Prune) -> int:
    """Of training after pruning, its first and last among them; of mask and weights learnt together, at most."""
    asked = wanted.finetune and wanted.finetune.record_every
    if wanted.tokens is not None:
        steps = Stream(splits["train"].samples(), Streaming.batch).steps(wanted.tokens, "tokens")
        return 3 + (steps // asked if asked else min(STATES, steps))
    steps = _steps_trained(recipe, splits, wanted)
    return 2 + steps // (asked or recipe.train.record.every) if steps else 0


def _scored(
    name: str, recipe: Recipe, shape: Shape, model: nn.Module, splits: dict[str, Split], task: Task, samples: int, states: int
) -> Work:
    criterion = get_criterion(name)
    if not criterion.needs_data:
        return Work(memory={"model": SINGLE * shape.parameters})
    if criterion.by_inputs:
        return evaluated(shape, samples)
    if criterion.group != "sum":
        return gradients(shape, samples, batch=samples)
    target = dict(parse(name).singles[0].options).get("target", task.target if criterion.needs_path else "loss")
    function, few = gather(Trajectory.of(model), model, splits["scoring"].samples(FEW).first(FEW), task=task).explained(target)
    return score_path(
        shape,
        samples=samples,
        pieces=max(1, states - 1) if criterion.needs_path else 1,
        targets=targets_of(function, Trajectory.of(model).state(-1), *few.rows(0, 1)),
        checked=criterion.needs_path,
        memory=recipe.score.options()["memory"],
    )


def _seconds(recipe: Recipe, works: Mapping[str, Work], shape: Shape, machine: Machine, wanted: Prune, states: int,
             reading: float) -> dict[str, float]:  # fmt: skip
    """By verb: what goes through the model, at this machine's rates; reading, and what has a limit of its own."""
    refining = wanted.repair is not None and wanted.repair.budget is not None
    beside = {
        "prune": (parse_seconds(str(wanted.repair.budget)) if refining and wanted.repair else 0.0)
        + (TRIES * TIMING if wanted.budget[0] in TIMES else 0.0),
        "eval": TIMING * len(recipe.eval.latency_batches),
    }
    found = {verb: work.seconds(shape, machine) + beside.get(verb, 0.0) for verb, work in works.items()}
    return {"import": 2 * reading * states, **found, "report": 1.0, "export": 2 * reading}


def _memory(model: nn.Module, works: Mapping[str, Work]) -> dict[str, Any]:
    """Bytes: the dense model and a pruned one, and what the verb that needs most holds beside them and its batches."""
    most = max(works, key=lambda verb: works[verb].bytes)
    parts = {name: round(count) for name, count in works[most].memory.items() if name != "model"}
    models = 2 * in_memory(model)
    return {"models": models, "verb": most, "parts": parts, "all": models + sum(parts.values())}


def _disk(model: nn.Module, prunable: int, names: Sequence[str], states: int, out: Path) -> dict[str, int]:
    """Bytes: ``states`` of the path and of fine-tuning, scores by criterion, the pruned model with masks and plan, and the model

    in ``out``.
    """
    found = {
        "run": SINGLE * Layout.of(model).total * states + SINGLE * prunable * len(names) + in_memory(model) + 2 * prunable,
        "model": in_memory(model),
    }
    return {**found, "all": sum(found.values()), "free": room_for(out)}
