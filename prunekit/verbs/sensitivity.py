"""sensitivity: which layers bear pruning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit import checkpoint
from prunekit.errors import ArtifactError
from prunekit.plan import check_sparsity, check_structure
from prunekit.report import save_figure, sensitivity_figure
from prunekit.search import Candidates, sensitivity
from prunekit.verbs.run_folder import Run, recorded_inputs, reusable

SCHEMA = 1
FACTS = ("layer", "sparsity", "removed")
"""What a cell is; figures of the task's measures follow."""


def sensitivity_run(
    run: Run, structure: str, criterion: str, sparsities: Sequence[float] = (), overwrite: bool = False
) -> dict[str, Any]:
    """Writes sensitivity-<structure>.json, .csv and .png into the run folder; the grid is the recipe's unless given.

    Raises:
        UsageError: unknown structure, or a sparsity out of range.
        ArtifactError: the criterion has no score file, or the table there was made from something else.
    """
    check_structure(structure)
    for sparsity in sparsities:
        check_sparsity(sparsity)
    scores = run.scores(criterion)
    grid = list(dict.fromkeys(sparsities or run.recipe.compare.sparsities))
    made_from = {
        "criterion": criterion,
        "scores": scores.digest,
        "structure": structure,
        "sparsities": grid,
        "validation": run.splits["validation"].digest(),
        **({"task": run.task.facts()} if run.task.facts() else {}),
    }
    path = run.path / f"sensitivity-{structure.replace(':', '-')}.json"
    if reusable(path, recorded_inputs(path, lambda p: read_sensitivity(p)["made_from"]), made_from, overwrite):
        result = read_sensitivity(path)
    else:
        started = time.perf_counter()
        candidates = Candidates(
            run.model.to(run.device),
            {criterion: scores},
            run.batches("validation"),
            [structure],
            run.recipe.structure.mappings(),
            run.task,
        )
        found = sensitivity(candidates, structure, criterion, grid)
        run.model.cpu()
        cost = {"seconds": round(time.perf_counter() - started, 3)}
        result = {"schema": SCHEMA, "kind": "sensitivity", "made_from": made_from, **found, "cost": cost}
        _views(path, result)
        checkpoint.write_json(path, result)
        return {**result, "path": str(path), "reused": False}
    _views(path, result)
    return {**result, "path": str(path), "reused": True}


def _views(path: Path, result: dict[str, Any]) -> None:
    checkpoint.write_text(path.with_suffix(".csv"), checkpoint.csv_text(tuple(result["cells"][0]), result["cells"]))
    save_figure(sensitivity_figure(result), path.with_suffix(".png"))


def read_sensitivity(path: Path) -> dict[str, Any]:
    """Raises ArtifactError when the file is missing, damaged, or of a newer schema."""
    found = checkpoint.read_json(path, "sensitivity")
    with checkpoint.reading(path, "sensitivity"):
        if found["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: schema {found['schema']}, this prunekit reads {SCHEMA}")
        for cell in found["cells"]:
            [cell[column] for column in FACTS]
            [float(value) for key, value in cell.items() if key not in FACTS]
        [float(value) for value in found["dense"].values()], found["made_from"]["structure"], found["made_from"]["criterion"]
        return found
