"""compare over cases and seeds: the pieces of a study's jobs, done by whatever executor, and what they come to."""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunekit import checkpoint
from prunekit.durable import locked, replacing, together
from prunekit.errors import UsageError
from prunekit.executors import Piece, engine
from prunekit.imports import load_object
from prunekit.measure import machine
from prunekit.progress import Bar
from prunekit.recipe import Data, Recipe, Study
from prunekit.search.paper_table import Measured, methods_of
from prunekit.search.study import StudyRecord
from prunekit.search.study_rows import SPLITS, rows_text
from prunekit.search.summary import summarise
from prunekit.verbs.run_folder import Run
from prunekit.verbs.study_cells import Cell, Job, later_cells, one_shot_cells
from prunekit.verbs.study_folder import MANIFEST, StudyFolder
from prunekit.verbs.study_travel import Files, Lacking, Source, packed, travelling, unpack
from prunekit.verbs.study_worker import Rows, measure, prepare

TOKEN = ".prunekit.study"
"""In a study's folder while it is at work: a worker that finds the same text there sees the same disk."""


def run_study(
    study: str | Path,
    out: str | Path,
    *,
    executor: str | Executor | None = None,
    jobs: int = 1,
    device: str | None = None,
) -> StudyRecord:
    """A comparison over cases and seeds, as ``prunekit compare STUDY --out OUT``; goes on where it was stopped.

    Args:
        study: its YAML file.
        out: a folder, or an address for fsspec (``s3://bucket/study``).
        executor: what does the work: any ``concurrent.futures.Executor``, such as a Dask client's ``get_executor(pure=False)``,
            whose workers can import prunekit and what the recipes name; or ``"dask://HOST:PORT"``, ``"dask-local:8"``.
        jobs: without an executor, how many processes of this machine; in a script under ``if __name__ == "__main__":``.
        device: overrides the recipes'.

    Raises:
        UsageError: the study or a recipe makes no sense.
        PrunekitError: a cell failed, which is named; the cells of the others are kept.

    Example:
        >>> from prunekit import run_study
        >>> run_study("no-study.yaml", getfixture("tmp_path"))
        Traceback (most recent call last):
        prunekit.errors.UsageError: no-study.yaml: no such recipe
    """
    place = StudyFolder(out)
    asked, work = jobs_of_study(Path(study), place.folder, device)
    with place.opened():
        return study_run(asked, work, place, jobs, executor)


def study_run(
    study: Study, jobs: Sequence[Job], place: StudyFolder, processes: int = 1, executor: str | Executor | None = None
) -> StudyRecord:
    """Does every job and writes compare.json, compare.csv, compare.png and report.html into the study's place.

    Finished cells lie there in ``cells`` and are not measured again; those made from something else are.

    Args:
        place: opened.
        processes: of this machine.
        executor: what does the work instead, see ``prunekit.executors.engine``.

    Raises:
        PrunekitError: whatever the first piece that failed says; the cells of the others are kept.
    """
    from prunekit.report import save_figure, study_figure, write_study_page  # needs an extra, and says so before anything is done

    started, out = time.perf_counter(), place.folder
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(locked(job.cells))
        place.fetch(jobs)
        shared = stack.enter_context(_token(out))
        bar = stack.enter_context(Bar("compare (cells)", sum(job.pieces for job in jobs)))
        found = stack.enter_context(engine(executor, processes))
        at_work = [_AtWork(job, number, place, _source(job, out, shared), bar) for number, job in enumerate(jobs)]
        found.drive([one.first() for one in at_work], _done)
    facts = [one.facts for one in at_work]
    measures = facts[0]["measures"]
    other = next((f for f in facts if f["measures"] != measures), None)
    if other is not None:
        raise UsageError(f"{other['case']} and {facts[0]['case']} are of other tasks, whose measures cannot be compared")
    rows = [row for one in at_work for row in one.rows()]
    methods = methods_of(study.criteria)
    result = StudyRecord(
        study=study.model_dump(mode="json"),
        machine=machine(),
        runs=facts,
        measures=measures,
        summary=summarise(rows, methods, measures),
        rows=len(rows),
        cost={"seconds": round(time.perf_counter() - started, 1), "processes": processes, "executor": found.told},
    )
    table = rows_text(rows, measures)
    measured = Measured.of_study(result, rows, methods)
    with together(out) as staged:
        checkpoint.write_text(staged.folder / "compare.csv", table)
        save_figure(study_figure(measured, result.summary), staged.folder / "compare.png")
        write_study_page(staged.folder / "report.html", result, measured)
        result.save(staged.folder / "compare.json")
    place.send([out / name for name in ("compare.csv", "compare.png", "report.html", "compare.json")], out / "compare.json")
    return result


@contextmanager
def _token(out: Path) -> Iterator[tuple[str, str]]:
    """Puts a file by which workers know whether they see this disk; yields its path and its text."""
    path, text = out.absolute() / TOKEN, secrets.token_hex(16)
    with replacing(path) as temporary:
        temporary.write_text(text)
    try:
        yield str(path), text
    finally:
        with suppress(OSError):
            path.unlink()


def _source(job: Job, out: Path, shared: tuple[str, str]) -> Source:
    recipe = None if job.recipe is None else job.recipe.model_dump(mode="json")
    study = job.study.model_dump(mode="json")
    folders = (str(out.absolute()),)
    return Source(job.case, job.seed, str(job.run.absolute()), study, recipe, job.device, shared, folders)


class _AtWork:
    """A job under way: its cells as they come to be known, first the one-shot ones, then those that these decide."""

    def __init__(self, job: Job, number: int, place: StudyFolder, source: Source, bar: Bar) -> None:
        self.job, self.number, self.source, self._place, self._bar = job, number, source, place, bar
        self.cells: list[Cell] = []
        self._told: dict[str, Any] = {}
        self._again: dict[str, list[str]] | None = None
        self._stage, self._left = 0, 0

    def first(self) -> Piece:
        """Trains and scores."""
        return Piece(self.job.name, (self.number, 0), prepare, (self.source,), self)

    def prepared(self, told: dict[str, Any], files: Files | None) -> list[Piece]:
        """Takes what ``prepare`` told; gives the one-shot pieces."""
        if files is not None:
            with locked(self.job.run):
                unpack(files, self.job.run)
        self._place.send(travelling(self.job.run), self.job.run / MANIFEST)
        self._told = told
        self._bar.advance()
        return self._next(list(one_shot_cells(self.job, told)))

    def measured(self, cell: Cell, rows: list[Rows]) -> list[Piece]:
        """Keeps a cell's rows; gives the pieces that come after, where it was the last of its stage."""
        cell.keep(rows)
        self._place.send(cell.files)
        self._bar.advance()
        self._left -= 1
        return [] if self._left else self._after()

    def _next(self, cells: list[Cell]) -> list[Piece]:
        """The pieces of a stage, those that are there already left out."""
        self._stage += 1
        self.cells += cells
        measures = [m["name"] for m in self._told["facts"]["measures"]]
        for cell in cells:
            cell.read(measures)
            self._place.send(cell.rows)
        missing = [cell for cell in cells if cell.missing]
        self._bar.advance(len(cells) - len(missing))
        self._left = len(missing)
        pieces = [
            Piece(
                f"{self.job.name}, {cell.name}", (self.number, self._stage), measure,
                (self.source, cell.kind, cell.asked()), (self, cell),
            )
            for cell in missing
        ]  # fmt: skip
        return pieces or self._after()

    def _after(self) -> list[Piece]:
        if self._again is not None:
            return []
        cells, self._again = later_cells(self.job, self._told, [row for row in self.rows() if row["epochs"] == 0])
        return self._next(cells)

    def rows(self) -> list[dict[str, Any]]:
        """Every row of pruned models, in the order of the cells."""
        here = {"case": self.job.case, "seed": self.job.seed}
        pruned = (cell for cell in self.cells if cell.kind != "dense_tuned")
        return [{**here, **row} for cell in pruned for path in cell.files for row in cell.rows[path]]

    @property
    def facts(self) -> dict[str, Any]:
        found = {**self._told["facts"], "run": self._place.told(self.job.run)}
        for cell in self.cells:
            if cell.kind == "dense_tuned":
                ((row,),) = cell.rows.values()
                found["dense_tuned"] = {"epochs": row["epochs"], **{split: row[split] for split in SPLITS}}
        return {**found, "again": self._again} if self._again else found


def _done(piece: Piece, result: Any) -> Sequence[Piece]:
    """What comes after a piece. To workers that do not see this disk a run's files travel where they are lacking."""
    one, cell = (piece.about, None) if isinstance(piece.about, _AtWork) else piece.about
    if isinstance(result, Lacking):
        return [replace(piece, arguments=(*piece.arguments, packed(one.job.run)))]
    return one.prepared(*result) if cell is None else one.measured(cell, result)


def jobs_of_study(path: Path, out: Path, device: str | None = None) -> tuple[Study, list[Job]]:
    """A study's jobs: every case with every seed, in ``out/runs``.

    A seed is the recipe's (weights and order of samples) and, where the data factory takes one, the split's.

    Args:
        device: overrides the recipes'.
    """
    study = Study.load(path)
    jobs = []
    for case, recipe_path in study.cases.items():
        recipe = Recipe.load(path.parent / recipe_path)
        for seed in study.seeds:
            changed = recipe.model_dump(mode="json") | {"seed": seed, **({"device": device} if device else {})}
            changed["score"] |= {"samples": study.samples}
            if recipe.data is not None:
                changed["data"] = _reseeded(recipe.data, seed)
            name = f"{case}-seed{seed}"
            jobs.append(
                Job(case, seed, out / "runs" / name, out / "cells" / name, study, Recipe.of(changed, recipe_path), device)
            )
    return study, jobs


def _reseeded(data: Data, seed: int) -> dict[str, Any]:
    """A recipe's data section with the seed of its splits, where they have one."""
    said = data.model_dump(mode="json")
    if data.factory is None:
        return {**said, "seed": seed}
    takes = "seed" in inspect.signature(load_object(data.factory, "data")).parameters
    return {**said, "args": {**data.args, "seed": seed}} if takes else said


def jobs_of_runs(paths: Sequence[Path], out: Path) -> tuple[Study, list[Job]]:
    """Runs that are there already, their scores made: recipes that differ in nothing but seeds are one case.

    Raises:
        UsageError: no criterion has been scored in all of them, or two runs are the same case and seed.
    """
    runs = [Run(path) for path in paths]
    scored = [list(run.all_scores()) for run in runs]
    names = [name for name in scored[0] if all(name in others for others in scored)]
    if not names:
        raise UsageError(f"no criterion has a score file in all of {', '.join(str(p) for p in paths)}")
    options = runs[0].recipe.compare
    study = Study.of(
        {
            "cases": {run.path.name: str(run.path) for run in runs},
            "seeds": list(dict.fromkeys(run.recipe.seed for run in runs)),
            "criteria": names,
            "structures": dict.fromkeys(options.structures, options.sparsities),
            "allocations": dict.fromkeys(options.structures, options.allocations),
        },
        "compare",
    )
    found: dict[str, str] = {}
    jobs: list[Job] = []
    for run in runs:
        facts = run.recipe.training_facts()
        same = str(
            {**facts, "seed": 0, "data": {**facts["data"], "seed": 0, "args": {**facts["data"].get("args", {}), "seed": 0}}}
        )
        case = found.setdefault(same, run.path.name)
        if any((job.case, job.seed) == (case, run.recipe.seed) for job in jobs):
            raise UsageError(f"{run.path}: the same recipe and seed as another run; a seed counts once")
        jobs.append(Job(case, run.recipe.seed, run.path, out / "cells" / run.path.name, study, None))
    return study, jobs
