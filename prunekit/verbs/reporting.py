"""report, run: the page, and the whole recipe from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunekit import checkpoint
from prunekit.recipe import Recipe
from prunekit.report import write_page
from prunekit.search import Comparison
from prunekit.verbs.evaluating import evaluate
from prunekit.verbs.pruning import prune_run
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scoring import compare_run, score_run
from prunekit.verbs.training import train_run

Announce = Callable[[str], None]


def report_run(run: Run) -> Path:
    """Writes RUN/report.html from whatever the run holds by now."""
    trajectory = run.trajectory
    headers = [checkpoint.read_header(run.score_path(name), "scores") for name in _names(run)]
    comparison = run.path / "compare.json"
    training = run.path / "train.json"
    evaluations = {
        path.parent.name: checkpoint.read_json(path, "evaluation")
        for path in sorted((run.path / "pruned").glob("*/eval.json"))
        if not path.parent.name.startswith(".")
    }
    path = run.path / "report.html"
    write_page(
        path,
        name=run.path.resolve().name,
        recipe=(run.path / "recipe.yaml").read_text(),
        training=checkpoint.read_json(training, "training") if training.exists() else None,
        trajectory={
            "steps": len(trajectory),
            "coordinates": trajectory.layout.total,
            "bytes": sum(p.stat().st_size for p in trajectory.folder.iterdir()),
            "hash": trajectory.hash,
        },
        scores=[
            {"criterion": h["provenance"]["criterion"], "digest": h["digest"], "seconds": h["cost"].get("seconds", 0.0)}
            for h in headers
        ],
        comparison=Comparison.load(comparison) if comparison.exists() else None,
        evaluations=evaluations,
    )
    return path


def run_recipe(
    recipe: Recipe, out: Path, overwrite: bool, show: Callable[[str, Any], None], announce: Announce
) -> dict[str, Any]:
    """Everything the recipe asks for, in order; what is there already and unchanged is reused.

    Args:
        show: called with each verb's name and result as soon as it is there.
    """
    trained = train_run(recipe, out, overwrite, announce)
    show("train", trained)
    run = Run(out)
    scored = score_run(run, ["all"], overwrite)
    show("score", scored)
    comparison, reused = compare_run(run, overwrite)
    show("compare", (comparison, reused))
    pruned, evaluated = [], []
    for wanted in recipe.prune:
        done = prune_run(
            run, wanted.name, wanted.criterion, wanted.sparsity, wanted.structure, wanted.allocation, overwrite=overwrite
        )
        show("prune", done)
        pruned.append(done)
        result = evaluate(run, run.path / "pruned" / wanted.name, overwrite)
        show("eval", (wanted.name, result))
        evaluated.append(result)
    page = report_run(run)
    show("report", page)
    return {
        "train": trained,
        "score": scored,
        "compare": {"path": str(out / "compare.json"), "cells": len(comparison.cells), "reused": reused},
        "prune": pruned,
        "eval": evaluated,
        "report": str(page),
    }


def _names(run: Run) -> list[str]:
    return sorted(p.stem for p in (run.path / "scores").glob("*.safetensors"))
