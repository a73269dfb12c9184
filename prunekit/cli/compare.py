"""prunekit compare: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit import ranks
from prunekit.cli.opening import open_run
from prunekit.cli.options import STRUCTURE_HELP, Device, Json, Overwrite, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError
from prunekit.remote import Place, placed

YAML = (".yaml", ".yml")
PANELS = {
    "What is compared": ("structure", "allocation", "sparsity", "refine"),
    "Over runs, or a study": ("out", "jobs", "executor"),
    "Table for a paper": ("table", "rows", "against"),
}
RUNS_HELP = "A run; with --out several, or a study's recipe; or the folder or address that a study was written to."
OUT_HELP = "Folder of a comparison over runs or of a study, or an address for fsspec, as s3://bucket/study."
EXECUTOR_HELP = "What works on a study instead: dask://HOST:PORT, a scheduler of Dask; dask-local:WORKERS; see docs/scale.md."
TABLE_HELP = (
    "A table for a paper, mean and standard deviation over seeds with a paired test: latex, markdown or csv on stdout, "
    "or a file that ends in .tex, .md or .csv."
)
AGAINST_HELP = "Differences are to this criterion, or to dense; to the best by default."


@verb(
    after="score",
    headings=PANELS,
    shared=True,
    examples={
        "The scored criteria of a run": "prunekit compare runs/digits-cnn",
        "Channels at two sparsities": "prunekit compare runs/digits-cnn --structure channels --sparsity 0.5 --sparsity 0.8",
        "Runs of several seeds, on test data": "prunekit compare runs/seed-0 runs/seed-1 --out runs/seeds",
        "A study over cases and seeds": "prunekit compare recipes/comparison.yaml --out runs/comparison --jobs 2",
        "A study on the workers of Dask": "prunekit compare recipes/comparison.yaml --out runs/comparison --executor dask://head:8786",
        "A study in an object store": "prunekit compare recipes/comparison.yaml --out s3://bucket/comparison",
        "A study as a table for a paper": "prunekit compare recipes/five-criteria.yaml --out runs/five --table table.tex",
    },
)
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN… | STUDY", help=RUNS_HELP)],
    structure: Annotated[list[str] | None, typer.Option(help=f"{STRUCTURE_HELP}; repeatable.")] = None,
    allocation: Annotated[list[str] | None, typer.Option(help="global, uniform, …; repeatable.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share to remove; repeatable.")] = None,
    refine: Annotated[bool | None, typer.Option("--refine/--no-refine", help="Repair the best plans too.")] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help=OUT_HELP)] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes, with --out.")] = 1,
    executor: Annotated[str | None, typer.Option(metavar="SPEC", help=EXECUTOR_HELP)] = None,
    table: Annotated[str | None, typer.Option(metavar="FORMAT|FILE", help=TABLE_HELP)] = None,
    rows: Annotated[str | None, typer.Option(help="A row of the table is a criterion (default) or a sparsity.")] = None,
    against: Annotated[str | None, typer.Option(metavar="ROW", help=AGAINST_HELP)] = None,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare every scored criterion on validation data.

    With --out: over several runs, or over the cases and seeds of a study, on test data.
    """
    from prunekit.plan import check_sparsity, check_structure
    from prunekit.plan.allocation import get_allocation
    from prunekit.report.terminal.comparing import show_comparison
    from prunekit.verbs.comparing import compare_run

    output, asked = Output(quiet, as_json), _table(table, rows, against, as_json)
    for name in structure or []:
        check_structure(name)
    for name in allocation or []:
        get_allocation(name)
    for share in sparsity or []:
        check_sparsity(share)
    if out is not None and ranks.size() > 1:
        raise UsageError("--out works at cells in processes of its own (--jobs); start it without torchrun")
    own = structure or allocation or sparsity or refine is not None or overwrite
    if out is not None:
        if own:
            raise UsageError("--out takes structures, allocations, sparsities and refine from the study or the runs' recipes")
        paths = [_local(run) for run in runs]
        if device is not None and not (len(paths) == 1 and paths[0].suffix in YAML):
            raise UsageError("--device with --out is for a study that trains; runs that are there say theirs")
        _study(paths, out, jobs, executor, output, asked, device)
        return
    if len(runs) > 1 or Path(runs[0]).suffix in YAML:
        raise UsageError("several runs, or a study, need --out DIR")
    if jobs != 1 or executor is not None:
        raise UsageError("--jobs and --executor are for a comparison over runs or a study; give --out DIR")
    place = placed(runs[0])
    of_a_run = (place / "recipe.yaml").exists() or (place / "trajectory").exists()
    if (place / "compare.json").exists() and not of_a_run:
        if own or device:
            raise UsageError(f"{place} is a study's folder, whose figures are there; what is compared stands in its recipe")
        _shown(place, output, asked)
        return
    run = _local(runs[0])
    opened = open_run(run, device)
    with output.working(run):
        result = compare_run(opened, overwrite, structure or [], allocation or [], sparsity or [], refine)
    comparison, reused = result
    if asked is None or asked.file is not None:
        output.show(show_comparison, result)
    told: dict[str, str] = {}
    if asked is not None:
        from prunekit.verbs.tabling import measured_of_run

        told = _written(asked, measured_of_run(run, opened.recipe.seed, comparison), output)
    cells = {"dense": comparison.dense, "cells": comparison.cells, "cost": comparison.cost}
    output.finish({"path": str(run / "compare.json"), **cells, "reused": reused, **told})


def _table(table: str | None, rows: str | None, against: str | None, as_json: bool) -> Any:
    """What is asked of a table; None for none."""
    if table is None:
        if rows is not None or against is not None:
            raise UsageError("--rows and --against are for a table; give --table latex, markdown, csv, or a file")
        return None
    from prunekit.verbs.tabling import TableAsked

    asked = TableAsked.of(table, rows, against)
    if as_json and asked.file is None:
        raise UsageError("--json and --table both write to stdout; give --table a file, such as table.tex")
    return asked


def _written(asked: Any, measured: Any, output: Output) -> dict[str, str]:
    """Writes the table: to its file, or alone to stdout."""
    text = asked.write(measured)
    if asked.file is None:
        output.alone(text)
        return {}
    output.show(lambda file: print(f"table: {file}"), asked.file)
    return {"table": str(asked.file)}


def _study(paths: list[Path], out: str, jobs: int, executor: str | None, output: Output, asked: Any, device: str | None) -> None:
    from prunekit.executors import check_executor
    from prunekit.imports import use_working_folder
    from prunekit.verbs.study_folder import StudyFolder
    from prunekit.verbs.studying import jobs_of_runs, jobs_of_study, study_run

    if out.startswith("memory://"):
        raise UsageError(f"--out is {out}, the memory of this command, which ends with it; in Python call prunekit.run_study")
    if executor is not None:
        if jobs != 1:
            raise UsageError("--jobs counts processes of this machine; leave it out where --executor is given")
        check_executor(executor)
    to = StudyFolder(out)
    use_working_folder(to.folder, *(path for path in paths if path.is_dir()))
    if len(paths) == 1 and paths[0].suffix in YAML:
        study, work = jobs_of_study(paths[0], to.folder, device)
    else:
        study, work = jobs_of_runs(paths, to.folder)
    if (to.place / "recipe.yaml").exists():
        raise UsageError(f"--out is {out}, a run folder, whose own comparison would be replaced; give a folder of its own")
    if asked is not None:
        asked.check(study)
    with output.working(), to.opened():
        study_run(study, work, to, jobs, executor)
    _shown(to.place, output, asked)


def _local(run: str) -> Path:
    """The path of a run or a study's recipe, which are of this machine."""
    if isinstance(place := placed(run), Path):
        return place
    raise UsageError(f"{place}: no study's result (compare.json), and runs and recipes are read from this machine; copy it here")


def _shown(folder: Place, output: Output, asked: Any) -> None:
    """What a study came to, as its folder has it."""
    from prunekit.report.terminal.comparing import show_study
    from prunekit.verbs.tabling import read_study

    found, measured = read_study(folder)
    page = folder / "report.html"
    if asked is None or asked.file is not None:
        output.show(show_study, (found, page))
    told = _written(asked, measured, output) if asked is not None else {}
    output.finish({**found.content(), "path": str(page), **told})
