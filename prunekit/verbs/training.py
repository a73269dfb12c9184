"""train, import: what puts a trajectory into a run folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekit import checkpoint, trust
from prunekit.criteria import model_digest
from prunekit.data import Split
from prunekit.durable import together
from prunekit.errors import ArtifactError, PrunekitError, UsageError
from prunekit.recipe import Recipe, Watch, read_yaml
from prunekit.reusing import PROBLEM, reusable
from prunekit.structure import prunable_parameters
from prunekit.task import Task
from prunekit.task.evaluation import evaluate, measures_told
from prunekit.training import TrainOptions, train
from prunekit.training.record import WATCHED, TrainingRecord, measured_on
from prunekit.trajectory import (
    Layout,
    Recorder,
    Trajectory,
    disk_needed,
    load_into,
    read_weights,
    room_for,
    snapshot,
    write_checkpoints,
)
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.layout import refuse_meta
from prunekit.trajectory.loading import fitted
from prunekit.verbs.checks import Check, settled, told_on_itself, try_once, with_task
from prunekit.verbs.configured import config_facts
from prunekit.verbs.run_folder import RECORDED, load_splits


def train_run(
    recipe: Recipe, out: Path, overwrite: bool = False, announce: Any = print, most: int | None = None
) -> tuple[TrainingRecord, bool]:
    """Trains the recipe's model and records its path under ``out``.

    Args:
        most: bytes that the recording may take; None for what is free on the disk.

    Returns:
        what train.json holds, and whether it was there already.

    Raises:
        ArtifactError: ``out`` holds a trajectory of another recipe, the disk has too little room, or it would take more than
            ``most``.
        NonFiniteError: the loss or a weight became NaN or Inf.
    """
    recipe.may_save(out / "recipe.yaml")
    recipe = with_task(recipe)
    splits = load_splits(recipe, fetch=True)
    model = recipe.build_model()
    refuse_meta(model)
    recipe = settled(recipe, model, splits)
    try_once(recipe, model, splits)
    task = recipe.load_task()
    for note in told_on_itself(splits):
        announce(f"train: {note}")
    layout = Layout.of(model)
    facts = json.loads(json.dumps(recipe.training_facts()))
    provenance = {
        "recipe": facts, "start": model_digest(model), "data": {n: s.digest() for n, s in splits.items()}, **config_facts(recipe)
    }  # fmt: skip
    trajectory = out / "trajectory"
    if reusable(trajectory, made_from(trajectory), provenance, overwrite):
        save_recipe(recipe, out, out, announce)
        return TrainingRecord.load(out / "train.json"), True

    how = TrainOptions(
        splits["train"].batch, len(splits["train"]), task=task, epochs=recipe.train.epochs, batch_size=recipe.train.batch_size,
        seed=recipe.seed, drop_last=recipe.train.drop_last, augment=recipe.load_augment(), device=recipe.device,
    )  # fmt: skip
    steps = how.steps
    keep = recipe.train.record
    needed = disk_needed(model, steps, how.samples * how.epochs, keep.every, keep.states, keep.second_moments)
    announce(
        f"train: {steps} steps of {layout.total:,} coordinates; the trajectory takes {needed / 1e6:.1f} MB of disk under {out}"
    )
    if most is not None and needed > most:
        raise ArtifactError(
            f"the trajectory takes {needed / 1e6:.3f} MB, at most {most / 1e6:.3f} MB travel where no disk is shared; run the "
            "study on a disk that all workers see, or record fewer steps (train.record.every)"
        )
    _check_room(out, needed)
    model.to(recipe.device)
    optimizer, scheduler = recipe.build_optimizer(model, steps)
    started = time.perf_counter()
    partial = out / "trajectory.partial"  # stays, readable, if training is cut off; never touches a whole one
    if _can_resume(partial, provenance):
        recorder = Recorder.resume(partial, model, optimizer, scheduler)
        announce(f"train: goes on after step {recorder.steps} of a recording that was cut off ({partial})")
    else:
        shutil.rmtree(partial, ignore_errors=True)
        recorder = Recorder(partial, model, optimizer, provenance, scheduler=scheduler, **keep.model_dump())
    watched: list[dict[str, float]] = recorder.aside.setdefault("watched", [])
    with recorder:
        losses = train(
            model, optimizer, scheduler, how, recorder=recorder,
            after_epoch=_watching(recipe.train.watch, model, splits, task, watched),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        # measured while the recording is open: cut off here, it goes on from its last snapshot, which a finished one has not
        figures = {name: _figure(model, splits[name], task) for name in WATCHED} if task.measures else None
    first = task.measures[0].name if task.measures else None
    sizes = {name: len(splits[name]) for name in WATCHED} if task.measures else {}
    record = TrainingRecord(
        steps=recorder.steps,
        coordinates=layout.total,
        losses=losses,
        accuracies=watched,
        accuracy=figures if first == "accuracy" else None,
        measure=first if first != "accuracy" else None,
        figures=figures if first != "accuracy" else None,
        samples={name: measured_on(size) for name, size in sizes.items() if measured_on(size) < size} or None,
        measures=measures_told(task),
        cost={"seconds": round(seconds, 3)},
    )
    with together(out) as staged:
        record.save(staged.folder / "train.json")
        save_recipe(recipe, staged.folder, out, announce)
        staged.take(partial.name, trajectory.name)
    return record, False


def training_facts(out: Path, record: TrainingRecord, reused: bool) -> dict[str, Any]:
    """What train says to programs."""
    return {**record.content(), "trajectory": Trajectory(out / "trajectory").hash, "reused": reused}


def import_run(
    recipe: Recipe,
    weights: Sequence[Path],
    out: Path,
    overwrite: bool = False,
    announce: Callable[[str], None] = print,
    read: Callable[[Path], Mapping[str, Tensor]] = read_weights,
    check: Check | None = None,
) -> dict[str, Any]:
    """Puts checkpoints of a model that was trained elsewhere under ``out``, in training order.

    Args:
        weights: where they lie; of a pretrained model none are needed, those of its folder are then meant.
        read: a checkpoint's tensors.
        check: what else may refuse the model with its data, before anything is written.

    Raises:
        ArtifactError: a file holds no weights or does not fit the model, or ``out`` holds something else.
    """
    if not weights and recipe.model.pretrained is None:
        raise UsageError("import needs at least one --weights file")
    recipe.may_save(out / "recipe.yaml")
    recipe = with_task(recipe)
    model = recipe.build_model(weights=not weights)
    if not weights:
        weights, read = [Path(recipe.model.source)], lambda folder: model.state_dict()
    if any(tensor.is_meta for tensor in named_tensors(model).values()):  # shapes alone: the weights are what it is tried with
        load_into(model, fitted(read(weights[-1]), model), weights[-1])
    prunable_parameters(model, Layout.of(model), recipe.prunable.ignore, recipe.prunable.include)
    splits = load_splits(recipe, fetch=True) if recipe.data is not None else None
    recipe = settled(recipe, model, splits)
    recipe.load_task()
    provenance = {
        "recipe": json.loads(json.dumps(recipe.training_facts())),
        "imported": [checkpoint.digest(read(path)) for path in weights],
        **config_facts(recipe),
    }
    if splits is not None:
        try_once(recipe, model, splits, training=False)
        if check is not None:
            check(recipe, model, splits)
        for note in told_on_itself(splits):
            announce(f"import: {note}")
    trajectory = out / "trajectory"
    reused = reusable(trajectory, made_from(trajectory), provenance, overwrite)
    if not reused:
        _check_room(out, 4 * Layout.of(model).total * len(weights))
        with together(out) as staged:
            write_checkpoints(staged.folder / trajectory.name, model, weights, provenance, read)
            save_recipe(recipe, staged.folder, out, announce)
            staged.remove("train.json")
    else:
        save_recipe(recipe, out, out, announce)
    opened = Trajectory(trajectory)
    return {
        "states": len(opened) + 1,
        "coordinates": opened.layout.total,
        "trajectory": opened.hash,
        "path": len(opened) > 0,
        "task": None if recipe.data is None else recipe.load_task().name,
        "reused": reused,
    }


def save_recipe(recipe: Recipe, place: Path, out: Path, announce: Callable[[str], None]) -> None:
    """Writes the user's recipe into ``place``, from where it comes into the run folder ``out``: later commands may follow it."""
    recipe.save(place / "recipe.yaml")
    if why := trust.remember(out, read_yaml(place / "recipe.yaml")):
        announce(f"the run cannot be noted as yours: {why}")


def _watching(
    watch: Watch | None, model: nn.Module, splits: Mapping[str, Split], task: Task, found: list[dict[str, float]]
) -> Callable[[int], bool]:
    """For ``train``: adds ``epoch`` and the first measure's figures to ``found`` now and then; says whether training may end."""

    def after_epoch(epochs: int) -> bool:
        if watch is None or epochs % watch.every or not task.measures:
            return False
        now = {name: _figure(model, splits[name], task) for name in WATCHED}
        found.append({"epoch": epochs, **now})
        sign = task.measures[0].sign
        return watch.until is not None and min(sign * value for value in now.values()) >= sign * watch.until

    return after_epoch


def _figure(model: nn.Module, split: Split, task: Task) -> float:
    samples, most = split.samples(), measured_on(len(split))
    if most < len(samples):
        samples = samples.take(number * len(samples) // most for number in range(most))
    return evaluate(model, samples, task).figures()[task.measures[0].name]


def made_from(trajectory: Path) -> dict[str, Any] | None:
    if not trajectory.exists():
        return None
    try:
        opened = Trajectory(trajectory)
        opened.verify()  # a damaged one may not be reused
        _ = opened.fixed
        if opened.header["optimizer"] is not None and RECORDED not in opened.provenance:
            TrainingRecord.load(trajectory.parent / "train.json")
        with checkpoint.reading(trajectory / "trajectory.json", "trajectory"):
            return given(opened.header)
    except PrunekitError as error:
        return {PROBLEM: str(error)}


def _can_resume(partial: Path, provenance: dict[str, Any]) -> bool:
    """Whether a recording of the very same training was cut off here, with a snapshot to go on from."""
    try:
        header = checkpoint.read_json(partial / "trajectory.json", "trajectory")
        checkpoint.read_header(partial / snapshot.NAME, "snapshot")
        return not header["complete"] and given(header) == provenance
    except (ArtifactError, KeyError):
        return False


def given(header: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in header["provenance"].items() if k not in ("prunekit", "torch")}


def _check_room(out: Path, needed: int) -> None:
    free = room_for(out)
    if needed > free:
        raise ArtifactError(
            f"{out}: the trajectory takes {needed / 1e6:.3f} MB, {free / 1e6:.3f} MB are free; choose another --out"
        )
