"""import --trajectory: what a Recorder left in somebody's own training loop becomes a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prunekit import checkpoint
from prunekit.data import Split
from prunekit.data.files.options import names_files, placed
from prunekit.durable import together
from prunekit.errors import ArtifactError, UsageError
from prunekit.recipe import Optimizer, RateSchedule, Recipe, Record
from prunekit.remote import Place, Remote
from prunekit.reusing import reusable
from prunekit.structure import prunable_parameters
from prunekit.trajectory import Trajectory, load_into
from prunekit.trajectory.layout import refuse_meta
from prunekit.trajectory.proof import LOG
from prunekit.verbs.checks import settled, told_on_itself, try_once, with_task
from prunekit.verbs.configured import config_facts
from prunekit.verbs.run_folder import load_splits
from prunekit.verbs.training import RECORDED, given, made_from, save_recipe


def import_recording(
    recipe: Recipe, folder: Place, out: Path, overwrite: bool = False, announce: Callable[[str], None] = print
) -> dict[str, Any]:
    """Makes a run of the trajectory in ``folder``, which stays; where it is ``out/trajectory`` itself, the run is made around it.

    The files are linked where the file system allows it, and take no room twice; else, and from a store, they are copied. The
    recipe's ``train`` is what the recording shows of it (optimizer, size of batches, epochs): fine-tuning takes it over.

    Returns:
        the same facts as ``import_run``.

    Raises:
        ArtifactError: there is no trajectory, it is damaged or was cut off, is of another model or of fine-tuning, or ``out``
            holds something else.
        UsageError: the model or the data are not those that were recorded.
    """
    recipe.may_save(out / "recipe.yaml")
    trajectory = _whole(folder, recipe)
    recipe = with_task(recipe)
    model = recipe.build_model(weights=False)
    refuse_meta(model)
    try:
        trajectory.layout.check(model)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}; {recipe.model.said}, see what it is made from") from None
    load_into(model, trajectory.model_state(), folder)
    prunable_parameters(model, trajectory.layout, recipe.prunable.ignore, recipe.prunable.include)
    splits = load_splits(recipe, fetch=True) if recipe.data is not None else None
    recipe = settled(_as_recorded(recipe, trajectory, splits), model, splits)
    recipe.load_task()
    if splits is not None:
        _check_samples(trajectory, splits["train"], folder)
        try_once(recipe, model, splits, training=False)
        for note in told_on_itself(splits):
            announce(f"import: {note}")
    noted = given(trajectory.header)
    provenance = {
        "recipe": json.loads(json.dumps(recipe.training_facts())),
        RECORDED: trajectory.hash,
        "noted": noted["noted"] if RECORDED in noted else noted,
        **config_facts(recipe),
    }
    place = out / "trajectory"
    here = isinstance(folder, Path) and place.exists() and place.samefile(folder)
    fresh = here and not {"recipe", RECORDED} & set(noted)
    reused = not fresh and reusable(place, made_from(place), provenance, overwrite)
    header = {**trajectory.header, "provenance": {**_versions(trajectory), **provenance}}
    if not reused and here:
        checkpoint.write_json(place / "trajectory.json", header)
    with together(out) as staged:
        if not reused:
            staged.remove("train.json")
        if not reused and not here:
            _link(folder, staged.folder / place.name)
            checkpoint.write_json(staged.folder / place.name / "trajectory.json", header)
        save_recipe(recipe, staged.folder, out, announce)
    return {
        "states": trajectory.pieces + 1,
        "coordinates": trajectory.layout.total,
        "trajectory": trajectory.hash,
        "path": len(trajectory) > 0,
        "task": None if recipe.data is None else recipe.load_task().name,
        "steps": len(trajectory),
        "reused": reused,
    }


def factory(given: str | Callable[..., Any], arguments: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """A recipe's section for a factory by import path, or for the function itself, which other programs must find again.

    Raises:
        UsageError: they could not: it is of the program that runs now, or made inside a function.
    """
    path = given if isinstance(given, str) else f"{getattr(given, '__module__', '')}:{getattr(given, '__qualname__', given)}"
    if not isinstance(given, str) and (path.startswith("__main__:") or "<" in path):
        raise UsageError(f"{key}: {path} cannot be imported by later commands; put it into a module, as a function of its own")
    return {"factory": path, "args": dict(arguments or {})}


def data_section(given: str | Path | Callable[..., Any], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """A recipe's section for data: of files, where a path or hub name is given, with ``arguments`` for its other keys; else of a

    factory.

    Raises:
        UsageError: see ``factory``.
    """
    if isinstance(given, Path) or (isinstance(given, str) and names_files(given)):
        return {"files": placed(str(given), Path()), **(arguments or {})}
    return factory(given, arguments, "data")


def _whole(folder: Place, recipe: Recipe) -> Trajectory:
    """The trajectory in ``folder``, once everything in it was compared with what was noted of it."""
    if not (folder / "trajectory.json").exists():
        raise ArtifactError(f"{folder}: no trajectory there (no trajectory.json); name the folder that was given to Recorder")
    trajectory = Trajectory(folder, recipe.score.optimizer_rules)
    if not trajectory.complete:
        raise ArtifactError(
            f"{folder}: recording was cut off after {len(trajectory)} steps; go on with Recorder.resume, or record again"
        )
    if isinstance(trajectory.provenance.get("parent"), dict):
        raise ArtifactError(f"{folder}: is of fine-tuning a pruned model; a run begins with the training of the dense one")
    trajectory.verify()
    return trajectory


def _as_recorded(recipe: Recipe, trajectory: Trajectory, splits: dict[str, Split] | None) -> Recipe:
    """The recipe with a ``train`` that says what the recording shows; what it does not show stays the default."""
    header, steps = trajectory.header, [trajectory.step(s) for s in range(len(trajectory))]
    moved = [step for step in steps if step.moved]
    changes: dict[str, Any] = {
        "record": Record(every=header["every"], states=header["states"], second_moments=header["second_moments"]),
        "schedule": RateSchedule(name="constant") if len({g["lr"] for s in moved for g in s.groups}) == 1 else RateSchedule(),
    }
    if (optimizer := _optimizer(header["optimizer"], max((g["lr"] for s in moved for g in s.groups), default=0.0))) is not None:
        changes["optimizer"] = optimizer
    batches = [step.batches for step in moved if step.batches]
    if batches:
        changes["batch_size"] = max(1, max(sum(map(len, one)) for one in batches))
        if splits is not None:
            seen = sum(len(batch) for one in batches for batch in one)
            changes["epochs"] = max(1, round(seen / len(splits["train"])))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _optimizer(described: dict[str, Any] | None, rate: float) -> Optimizer | None:
    """The recipe's words for an optimizer, of its first group, with the highest rate; None where they do not suffice."""
    name = str((described or {}).get("name", "")).removeprefix("torch.").lower()
    groups = (described or {}).get("groups")
    if name not in ("adamw", "adam", "sgd") or not groups:
        return None
    keys = ("weight_decay", "momentum", "nesterov") if name == "sgd" else ("weight_decay", "betas")
    try:
        return Optimizer(name=name, lr=rate, **{key: groups[0][key] for key in keys})  # type: ignore[arg-type]
    except ValueError:  # torch takes values that a recipe does not
        return None


def _check_samples(trajectory: Trajectory, train: Split, folder: Place) -> None:
    """Raises UsageError where a step saw a sample that the train split does not have."""
    for s in range(len(trajectory)):
        last = max((k for batch in trajectory.step(s).batches or () for k in batch), default=-1)
        if last >= len(train):
            raise UsageError(
                f"data: step {s} of {folder} saw sample {last}, and the train split has {len(train)}; its samples must be those "
                "of the loop, in the order of their indices"
            )


def _versions(trajectory: Trajectory) -> dict[str, Any]:
    return {key: value for key, value in trajectory.provenance.items() if key in ("prunekit", "torch")}


def _link(recording: Place, place: Path) -> None:
    """Puts the recording's files into a new folder, trajectory.json left out."""
    place.mkdir()
    if isinstance(recording, Remote):
        recording.get_all([name for name in recording.files() if _recorded(PurePosixPath(name))], place)
        return
    for path in [*recording.glob("*.*"), *recording.glob("part-*/rank-*/*")]:
        name = path.relative_to(recording)
        if not _recorded(PurePosixPath(name)):
            continue
        new = place / name
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), new)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, new)


def _recorded(name: PurePosixPath) -> bool:
    """Whether a file of a recording's folder is of the recording."""
    of_several = len(name.parts) == 3 and name.match("part-*/rank-*/*")
    rows = name.suffix == ".safetensors" and not name.name.startswith("snapshot")
    return (len(name.parts) == 1 or of_several) and (rows or name.name == LOG)
