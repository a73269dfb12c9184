"""report, run: the page, and the whole recipe from end to end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prunekit import checkpoint
from prunekit.errors import ArtifactError
from prunekit.explain import timeline
from prunekit.recipe import Recipe
from prunekit.report import write_page
from prunekit.search import Comparison
from prunekit.verbs.checks import probe_structures
from prunekit.verbs.comparing import compare_run
from prunekit.verbs.evaluating import evaluate, read_evaluation
from prunekit.verbs.explaining import explain_pruned, pictures_of, view_of
from prunekit.verbs.pruning import prune_run
from prunekit.verbs.run_folder import Run, load_splits
from prunekit.verbs.scoring import score_run
from prunekit.verbs.training import read_training, train_run

Announce = Callable[[str], None]
REPAIR_NODES = 8  # as refining itself; explain takes more


def report_run(run: Run) -> tuple[Path, list[str]]:
    """Writes RUN/report.html from whatever the run holds by now.

    Returns:
        the page, and what was left out because it was made from another trajectory, or is damaged: one line each.
    """
    trajectory = run.trajectory
    left_out: list[str] = []

    def kept(path: Path, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ArtifactError as error:
            left_out.append(str(error))
            return None

    scores = [s for path in run.score_files() if (s := kept(path, partial(run.scores_in, path))) is not None]
    digests = {s.digest for s in scores}
    compared, training = run.path / "compare.json", run.path / "train.json"
    comparison = kept(compared, lambda: Comparison.load(compared)) if compared.exists() else None
    if comparison is not None and not set(comparison.made_from.get("scores", {}).values()) <= digests:
        left_out.append(f"{compared}: made from other scores than the run has now")
        comparison = None
    evaluations = {}
    for path in sorted((run.path / "pruned").glob("[!.]*/eval.json")):
        found = kept(path, partial(read_evaluation, path))
        if found is not None and found["made_from"].get("trajectory") != trajectory.hash:
            left_out.append(f"{path}: made from another trajectory")
        elif found is not None:
            evaluations[path.parent.name] = found
    repairs = {}
    for name in [name for name, found in evaluations.items() if found.get("refine")]:
        told = kept(run.path / "pruned" / name, partial(explain_pruned, run, name, nodes=REPAIR_NODES))
        if told is not None:
            repairs[name] = told, pictures_of(run, told)
    page = run.path / "report.html"
    write_page(
        page,
        name=run.path.resolve().name,
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
        training=kept(training, lambda: read_training(training)) if training.exists() else None,
        trajectory={
            "steps": len(trajectory),
            "coordinates": trajectory.layout.total,
            "bytes": sum(p.stat().st_size for p in trajectory.folder.iterdir()),
            "hash": trajectory.hash,
        },
        scores=[{"criterion": s.criterion, "digest": s.digest, "seconds": s.cost.get("seconds", 0.0)} for s in scores],
        comparison=comparison,
        evaluations=evaluations,
        repairs=repairs,
        left_out=left_out,
        timeline=_timeline(run),
    )
    return page, left_out


def _timeline(run: Run) -> dict[str, Any] | None:
    """What ``prunekit.explain.timeline`` says of the run, kept in timeline.json; None without a path or data."""
    if len(run.trajectory) == 0 or run.recipe.data is None:
        return None
    view = view_of(run, "test")
    path, made_from = run.path / "timeline.json", {"trajectory": run.trajectory.hash, **view.facts}
    try:
        found = _read_timeline(path)
        if found["made_from"] == made_from:
            return found
    except ArtifactError:
        pass  # absent or damaged: it is made again
    found = {"schema": 1, "kind": "timeline", "made_from": made_from, **timeline(view)}
    checkpoint.write_json(path, found)
    return found


def _read_timeline(path: Path) -> dict[str, Any]:
    """Raises ArtifactError when timeline.json is missing, of another schema, or lacks what the page shows of it."""
    found = checkpoint.read_json(path, "timeline")
    with checkpoint.reading(path, "timeline"):
        if found["schema"] != 1:
            raise ArtifactError(f"{path}: schema {found['schema']}, this prunekit reads 1")
        layers, samples = found["layers"], found["samples"]
        _ = found["made_from"], found["samples_seen"], float(layers["change"]), float(layers["residual"])
        for row in layers["rows"]:
            _ = row["layer"], [(p["begin"], p["end"], float(p["kernel"]), float(p["regularisation"])) for p in row["phases"]]
        for row in samples["rows"] if samples else ():
            _ = row["sample"], row["label"], row["answer"], row["learned"], [float(v) for v in row["moved"]]
    return found


def run_recipe(
    recipe: Recipe, out: Path, overwrite: bool, show: Callable[[str, Any], None], announce: Announce
) -> dict[str, Any]:
    """Everything the recipe asks for, in order; what is there already and unchanged is reused.

    Args:
        show: called with each verb's name and result as soon as it is there.
    """
    probe_structures(recipe, recipe.build_model(), load_splits(recipe))
    trained = train_run(recipe, out, overwrite, announce)
    show("train", trained)
    run = Run(out)
    scored = score_run(run, ["all"], overwrite)
    show("score", scored)
    comparison, reused = compare_run(run, overwrite)
    show("compare", (comparison, reused))
    pruned, evaluated = [], []
    for wanted in recipe.prune:
        done = prune_run(run, wanted, overwrite=overwrite)
        show("prune", done)
        pruned.append(done)
        result = evaluate(run, run.path / "pruned" / wanted.name, overwrite)
        show("eval", (wanted.name, result))
        evaluated.append(result)
    page, left_out = report_run(run)
    show("report", (page, left_out))
    return {
        "train": trained,
        "score": scored,
        "compare": {"path": str(out / "compare.json"), "cells": len(comparison.cells), "reused": reused},
        "prune": pruned,
        "eval": evaluated,
        "report": str(page),
    }
