"""compare of one run: every criterion, allocation, structure and sparsity on validation data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunekit import bounded, checkpoint
from prunekit.durable import together
from prunekit.errors import ArtifactError
from prunekit.plan import Plan
from prunekit.recipe import CompareRefine
from prunekit.report import comparison_figure, save_figure
from prunekit.reusing import reusable
from prunekit.search import Comparison, compare
from prunekit.verbs.refining import refining, refining_request
from prunekit.verbs.run_folder import Run, comparison_inputs


def compare_run(
    run: Run,
    overwrite: bool = False,
    structures: Sequence[str] = (),
    allocations: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    refined: bool | None = None,
) -> tuple[Comparison, bool]:
    """Writes compare.json, compare.csv and compare.png from every score file of the run; empty lists mean the recipe's.

    Args:
        refined: whether the best plans are refined and measured too, as ``compare.refine`` in the recipe
            says (its defaults, where it says nothing); None leaves that to the recipe as well.

    Returns:
        the comparison, and whether it was there already.
    """
    options = run.recipe.compare
    asked = None if refined is False else options.refine or (CompareRefine() if refined else None)
    scores = run.all_scores()
    grid: dict[str, Any] = {
        "structures": list(structures or options.structures),
        "allocations": list(allocations or options.allocations),
        "sparsities": list(sparsities or options.sparsities),
    }
    made_from = {
        "scores": {name: s.digest for name, s in scores.items()},
        "validation": run.splits["validation"].digest(),
        **grid,
        **({"task": run.task.facts()} if run.task.facts() else {}),
        **({"refine": refining_request(run, asked)} if asked else {}),
    }
    path = run.path / "compare.json"
    if reusable(path, comparison_inputs(run), made_from, overwrite):
        found = Comparison.load(path)
        _write(run, found, anew=False)
        return found, True
    started = time.perf_counter()
    made = compare(
        run.model.to(run.device),
        scores,
        run.batches("validation"),
        made_from=made_from,
        attention=run.recipe.structure.mappings(),
        repair=_whole(refining(run, asked)) if asked else None,
        repair_at=asked.sparsities if asked else None,
        task=run.task,
        **grid,
    )
    run.model.cpu()
    made.cost["seconds"] = round(time.perf_counter() - started, 3)
    _write(run, made, anew=True)
    return made, False


def _whole(refined: Callable[[Plan], Plan]) -> Callable[[Plan], Plan]:
    """A plan is worth keeping half refined; a line of a comparison is not."""

    def whole(plan: Plan) -> Plan:
        better = refined(plan)
        if better.provenance["refine"]["ended"] == "interrupted":
            raise KeyboardInterrupt
        return better

    return whole


def _write(run: Run, comparison: Comparison, anew: bool) -> None:
    """compare.json, compare.csv and compare.png say the same: all are written, or those that do not."""
    table, picture, text = run.path / "compare.csv", run.path / "compare.png", comparison.csv()
    other = anew or not _holds(table, text)
    if not other and picture.is_file():
        return
    with together(run.path) as staged:
        if anew:
            comparison.save(staged.folder / "compare.json")
        if other:
            checkpoint.write_text(staged.folder / table.name, text)
        save_figure(comparison_figure(comparison), staged.folder / picture.name)


def _holds(file: Path, text: str) -> bool:
    try:
        return bounded.text(file, len(text.encode())) == text
    except ArtifactError:
        return False
