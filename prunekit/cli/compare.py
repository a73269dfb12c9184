"""prunekit compare: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import STRUCTURE_HELP, Device, Json, Overwrite, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError

PANELS = {
    "What is compared": ("structure", "allocation", "sparsity", "refine"),
    "Over runs, or a study": ("out", "jobs"),
}


@verb(
    after="score",
    headings=PANELS,
    examples={
        "The scored criteria of a run": "prunekit compare runs/digits-cnn",
        "Channels at two sparsities": "prunekit compare runs/digits-cnn --structure channels --sparsity 0.5 --sparsity 0.8",
        "Runs of several seeds, on test data": "prunekit compare runs/seed-0 runs/seed-1 --out runs/seeds",
        "A study over cases and seeds": "prunekit compare recipes/comparison.yaml --out runs/comparison --jobs 2",
    },
)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN… | STUDY", help="A run; with --out several, or a study.")],
    structure: Annotated[list[str] | None, typer.Option(help=f"{STRUCTURE_HELP}; repeatable.")] = None,
    allocation: Annotated[list[str] | None, typer.Option(help="global, uniform, …; repeatable.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share to remove; repeatable.")] = None,
    refine: Annotated[bool | None, typer.Option("--refine/--no-refine", help="Repair the best plans too.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of a comparison over runs or of a study.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes, with --out.")] = 1,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare every scored criterion on validation data.

    With --out: over several runs, or over the cases and seeds of a study, on test data.
    """
    from prunekit.plan import check_sparsity, check_structure
    from prunekit.plan.allocation import get_allocation
    from prunekit.report.terminal.comparing import show_comparison
    from prunekit.verbs.comparing import compare_run

    output = Output(quiet, as_json)
    for name in structure or []:
        check_structure(name)
    for name in allocation or []:
        get_allocation(name)
    for share in sparsity or []:
        check_sparsity(share)
    if out is not None:
        if structure or allocation or sparsity or refine is not None or device or overwrite:
            raise UsageError("--out takes structures, allocations, sparsities and refine from the study or the runs' recipes")
        _study(runs, out, jobs, output)
        return
    if len(runs) > 1 or runs[0].suffix in (".yaml", ".yml"):
        raise UsageError("several runs, or a study, need --out DIR")
    if jobs != 1:
        raise UsageError("--jobs is for a comparison over runs or a study; give --out DIR")
    run = runs[0]
    opened = open_run(run, device)
    with output.working(run):
        result = compare_run(opened, overwrite, structure or [], allocation or [], sparsity or [], refine)
    output.show(show_comparison, result)
    comparison, reused = result
    cells = {"dense": comparison.dense, "cells": comparison.cells, "cost": comparison.cost}
    output.finish({"path": str(run / "compare.json"), **cells, "reused": reused})


def _study(paths: list[Path], out: Path, jobs: int, output: Output) -> None:
    from prunekit.imports import use_working_folder
    from prunekit.report.terminal.comparing import show_study
    from prunekit.verbs.studying import jobs_of_runs, jobs_of_study, study_run

    use_working_folder(out, *(path for path in paths if path.is_dir()))
    if (out / "recipe.yaml").exists():
        raise UsageError(f"--out is {out}, a run folder, whose own comparison would be replaced; give a folder of its own")
    if len(paths) == 1 and paths[0].suffix in (".yaml", ".yml"):
        study, work = jobs_of_study(paths[0], out)
    else:
        study, work = jobs_of_runs(paths, out)
    with output.working(out):
        found, page = study_run(study, work, out, jobs), out / "report.html"
    output.show(show_study, (found, page))
    output.finish({**found.content(), "path": str(page)})
