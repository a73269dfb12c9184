"""timeline.json and removal.json: what a report explains, made where model and data are at hand and kept for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from prunekit.apply import Manifest
from prunekit.criteria import model_digest
from prunekit.errors import ArtifactError
from prunekit.explain import RemovalRecord, Timeline, timeline
from prunekit.explain.timeline import sources
from prunekit.verbs.explaining import explain_pruned
from prunekit.verbs.looking import view_of
from prunekit.verbs.run_folder import Run
from prunekit.verbs.showing import pictures_of

NODES = 8  # of a removal, as refining itself takes; explain takes more
Kept = TypeVar("Kept", Timeline, RemovalRecord)


def keep_timeline(run: Run) -> None:
    """Writes RUN/timeline.json, unless it is there and made from the same; nothing without a path or data."""
    if len(run.trajectory) == 0 or run.recipe.data is None:
        return
    view = view_of(run, "test")
    if _kept(Timeline, path := run.path / "timeline.json", sources(view)) is None:
        timeline(view).save(path)


def keep_removal(run: Run, name: str) -> None:
    """Writes RUN/pruned/NAME/removal.json for a refined model, unless it is there and made from the same.

    Raises:
        ArtifactError: the manifest is damaged, or what it is made again from.
    """
    folder = run.path / "pruned" / name
    manifest = Manifest.load(folder / "prunekit.json")
    if manifest.provenance.get("refine") is None:
        return
    made_from = {
        "trajectory": run.trajectory.hash,
        "model": model_digest(run.model),
        "plan": manifest.plan,
        "scoring": run.splits["scoring"].digest(),
        "samples": run.recipe.score.samples,
        "nodes": NODES,
        **({"task": run.task.facts()} if run.task.facts() else {}),
    }
    if _kept(RemovalRecord, path := folder / "removal.json", made_from) is None:
        started = time.perf_counter()
        told = explain_pruned(run, name, nodes=NODES)
        pictures = pictures_of(run, told)
        cost = round(time.perf_counter() - started, 3)
        RemovalRecord(made_from=made_from, told=told, pictures=pictures, cost={"seconds": cost}).save(path)


def _kept(kind: type[Kept], path: Path, made_from: Mapping[str, Any]) -> Kept | None:
    """The artifact that is there, if it is made from that; None where it is to be made."""
    try:
        found = kind.load(path)
    except ArtifactError:
        return None  # absent or damaged: it is made again
    return found if found.made_from == made_from else None
