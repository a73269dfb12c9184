"""sensitivity: which layers bear pruning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from prunekit import checkpoint
from prunekit.durable import together
from prunekit.plan import check_sparsity, check_structure
from prunekit.report import save_figure, sensitivity_figure
from prunekit.reusing import recorded_inputs, reusable
from prunekit.search import Candidates, Sensitivity, sensitivity
from prunekit.verbs.run_folder import Run


def sensitivity_run(
    run: Run, structure: str, criterion: str, sparsities: Sequence[float] = (), overwrite: bool = False
) -> tuple[Sensitivity, Path, bool]:
    """Writes sensitivity-<structure>.json, .csv and .png into the run folder; the grid is the recipe's unless given.

    Returns:
        the table, its file, and whether it was there already.

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
    reused = reusable(path, recorded_inputs(path, lambda p: Sensitivity.load(p).made_from), made_from, overwrite)
    if reused:
        found = Sensitivity.load(path)
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
        found = sensitivity(candidates, structure, criterion, grid, made_from)
        run.model.cpu()
        found.cost["seconds"] = round(time.perf_counter() - started, 3)
    with together(run.path) as staged:
        checkpoint.write_text(staged.folder / f"{path.stem}.csv", found.csv())
        save_figure(sensitivity_figure(found), staged.folder / f"{path.stem}.png")
        if not reused:
            found.save(staged.folder / path.name)
    return found, path, reused
