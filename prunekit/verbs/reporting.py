"""report, run: the page, and the whole recipe from end to end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prunekit import bounded
from prunekit.apply import Manifest
from prunekit.artifact import Artifact
from prunekit.errors import ArtifactError, UsageError
from prunekit.explain import EvaluationRecord, RemovalRecord
from prunekit.recipe import Recipe
from prunekit.report import SECTIONS, RunArtifacts, write_page
from prunekit.search import Comparison
from prunekit.training.record import TrainingRecord
from prunekit.verbs.accounts import keep_timeline
from prunekit.verbs.budgets import check_budget
from prunekit.verbs.checks import try_structures
from prunekit.verbs.comparing import compare_run
from prunekit.verbs.evaluating import evaluate
from prunekit.verbs.pruning import prune_run
from prunekit.verbs.run_folder import Run, load_splits
from prunekit.verbs.scoring import score_run
from prunekit.verbs.training import train_run, training_facts

Announce = Callable[[str], None]
Read = TypeVar("Read")
Kind = TypeVar("Kind", bound=Artifact)

OURS = b"<title>prunekit: "
"""Stands at the beginning of every page that prunekit writes."""


def report_runs(runs: Sequence[Run], page: Path | None = None) -> tuple[Path, list[str], list[str]]:
    """Writes one page from whatever runs hold by now; neither models nor data are looked at.

    Args:
        page: ``RUN/report.html`` by default, of a single run.

    Returns:
        the page; what was left out because it is damaged or was made from something else, one line each; and which command
        adds what is missing, one line each.

    Raises:
        UsageError: a run is given twice, or several are and no page; or ``page`` is no place for one.
    """
    names = _names([run.path for run in runs])
    if page is None:
        if len(runs) > 1:
            raise UsageError("several runs need --out PAGE.html")
        page = runs[0].path / "report.html"
    else:
        _check_page(page)
    found = [replace(run_artifacts(run), called=name) for run, name in zip(runs, names, strict=True)]
    return page, [line for artifacts in found for line in artifacts.left_out], write_page(page, found)


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells runs apart: the names of their folders, or where these are alike the paths as they were given."""
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise UsageError(f"{paths[number]} is given twice")
    folders = [path.name for path in resolved]
    return [name if folders.count(name) == 1 else str(path) for name, path in zip(folders, paths, strict=True)]


def _check_page(page: Path) -> None:
    """Raises UsageError where a page would not be one, or would replace what ``report`` did not write."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out is {page}; it must be the page to write, such as {page / 'report.html'}")
    if not page.parent.is_dir():
        raise UsageError(f"--out is {page}, and there is no folder {page.parent}")
    if page.exists() and not _is_ours(page):
        raise UsageError(f"--out is {page}, which is there and no page of prunekit's; give another name")


def _is_ours(page: Path) -> bool:
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return OURS in file.read(4096)


def run_artifacts(run: Run) -> RunArtifacts:
    """What a page is drawn from."""
    trajectory = run.trajectory
    left_out: list[str] = []

    def kept(read: Callable[[], Read]) -> Read | None:
        try:
            return read()
        except ArtifactError as error:
            if str(error) not in left_out:  # a part of several composed scores
                left_out.append(str(error))
            return None

    def own(kind: type[Kind], path: Path) -> Kind | None:
        return kept(partial(_own, kind, path, trajectory.hash)) if path.exists() else None

    scores = [s for path in run.score_files() if (s := kept(partial(run.recorded_scores, path))) is not None]
    compared, training = run.path / "compare.json", run.path / "train.json"
    comparison = kept(partial(Comparison.load, compared)) if compared.exists() else None
    if comparison is not None and not set(comparison.made_from.get("scores", {}).values()) <= {s.digest for s in scores}:
        left_out.append(f"{compared}: made from other scores than the run has now")
        comparison = None
    folders = {path.name: path for path in sorted((run.path / "pruned").glob("[!.]*"))}
    found = {name: own(EvaluationRecord, folder / "eval.json") for name, folder in folders.items()}
    evaluations = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
    removals = {}
    for name in [name for name, evaluation in evaluations.items() if evaluation.refine]:
        removal = own(RemovalRecord, folders[name] / "removal.json")
        if removal is not None and kept(partial(_check_plan, removal, folders[name])):
            removals[name] = removal
    asked = {kind: place for section in SECTIONS.values() for kind, place in section.reads.items()}
    read = {kind: own(kind, run.path / place) for kind, place in asked.items()}
    manifests = {name: kept(partial(_proved, folder)) for name, folder in folders.items() if _is_pruned(folder)}
    return RunArtifacts(
        path=run.path,
        recipe=bounded.text(run.path / "recipe.yaml", bounded.RECIPE),
        has_data=run.recipe.data is not None,
        trajectory={
            "steps": len(trajectory),
            "coordinates": trajectory.layout.total,
            "bytes": trajectory.bytes,
            "hash": trajectory.hash,
        },
        scores=[{"criterion": s.criterion, "digest": s.digest, "seconds": s.cost.get("seconds", 0.0)} for s in scores],
        training=kept(partial(TrainingRecord.load, training)) if training.exists() else None,
        comparison=comparison,
        pruned={name: manifest for name, manifest in manifests.items() if manifest is not None},
        evaluations=evaluations,
        removals=removals,
        single={kind: artifact for kind, artifact in read.items() if artifact is not None},
        left_out=left_out,
    )


def _own(kind: type[Kind], path: Path, trajectory: str) -> Kind:
    """Raises ArtifactError when the artifact is damaged, or was made from another trajectory."""
    found = kind.load(path)
    made_from: Mapping[str, Any] = found.content()["made_from"]
    if made_from.get("trajectory") != trajectory:
        raise ArtifactError(f"{path}: made from another trajectory")
    return found


def _is_pruned(folder: Path) -> bool:
    return (folder / "prunekit.json").exists()


def _proved(folder: Path) -> Manifest:
    """Raises ArtifactError when a pruned model is damaged, or was changed after it was written."""
    manifest = Manifest.load(folder / "prunekit.json")
    manifest.prove(folder)
    return manifest


def _check_plan(removal: RemovalRecord, folder: Path) -> bool:
    """Raises ArtifactError when an explanation is of another plan than the pruned model beside it."""
    plan = Manifest.load(folder / "prunekit.json").plan
    if removal.made_from.get("plan") != plan:
        raise ArtifactError(f"{folder / 'removal.json'}: made from plan {removal.made_from.get('plan')}, the model's is {plan}")
    return True


def run_recipe(
    recipe: Recipe, out: Path, overwrite: bool, show: Callable[[str, Any], None], announce: Announce
) -> dict[str, Any]:
    """Everything the recipe asks for, in order; what is there already and unchanged is reused.

    Args:
        show: called with each verb's name and result as soon as it is there.
    """
    model, splits = recipe.build_model(), load_splits(recipe)
    try_structures(recipe, model, splits)
    example = splits["validation"].batch(range(min(2, len(splits["validation"]))))[0]
    for wanted in recipe.prune:
        check_budget(wanted, recipe, model, example)
    trained = train_run(recipe, out, overwrite, announce)
    show("train", trained)
    return {"train": training_facts(out, *trained), **score_to_report(Run(out), ["all"], overwrite, show)}


def score_to_report(
    run: Run,
    criteria: Sequence[str],
    overwrite: bool,
    show: Callable[[str, Any], None],
    begin: Callable[[str], None] = lambda verb: None,
) -> dict[str, Any]:
    """What comes after a run's weights are there: scores, comparison, the recipe's pruned models measured, the page.

    Args:
        criteria: that are scored by.
        show: called with each verb's name and result as soon as it is there.
        begin: called with each verb's name before it begins.

    Returns:
        what these verbs say to programs, by their names.
    """
    begin("score")
    scored = score_run(run, criteria, overwrite)
    show("score", scored)
    begin("compare")
    comparison, reused = compare_run(run, overwrite)
    show("compare", (comparison, reused))
    pruned, evaluated, verdicts = [], [], []
    for wanted in run.recipe.prune:
        begin("prune")
        done = prune_run(run, wanted, overwrite=overwrite)
        if not done["reused"] and (done["refine"] or {}).get("ended") == "interrupted":
            shutil.rmtree(done["path"])  # of several verbs Ctrl-C ends all, and they go on from here when called again
            raise KeyboardInterrupt
        show("prune", done)
        pruned.append(done)
        begin("eval")
        evaluation, known = evaluate(run, run.path / "pruned" / wanted.name, overwrite)
        show("eval", (wanted.name, evaluation, known))
        evaluated.append({**evaluation.content(), "reused": known})
        verdicts.append((wanted.name, evaluation))
    keep_timeline(run)
    begin("report")
    reported = report_runs([run])
    show("report", reported)
    show("verdict", verdicts)
    return {
        "score": scored,
        "compare": {"path": str(run.path / "compare.json"), "cells": len(comparison.cells), "reused": reused},
        "prune": pruned,
        "eval": evaluated,
        "report": str(reported[0]),
    }
