"""compare over cases and seeds: every job of a study, here or in processes, and what they come to."""

from __future__ import annotations

import inspect
import multiprocessing
import queue
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunekit import checkpoint, stopping
from prunekit.durable import locked, together
from prunekit.errors import PrunekitError, UsageError
from prunekit.imports import load_object, use_working_folder
from prunekit.measure import machine
from prunekit.progress import Bar
from prunekit.recipe import Data, Recipe, Study
from prunekit.report import save_figure, study_figure, write_study_page
from prunekit.search.paper_table import Measured, methods_of
from prunekit.search.study import StudyRecord
from prunekit.search.study_rows import rows_text
from prunekit.search.summary import summarise
from prunekit.verbs.run_folder import Run
from prunekit.verbs.study_cells import Job, rows_of, work


def study_run(study: Study, jobs: Sequence[Job], out: Path, processes: int) -> StudyRecord:
    """Does every job and writes compare.json, compare.csv, compare.png and report.html into ``out``.

    Finished cells lie in ``out/cells`` and are not measured again; those made from something else are.

    Raises:
        PrunekitError: whatever the first job that failed says; the cells of the others are kept.
    """
    started = time.perf_counter()
    with Bar("compare (cells)", sum(job.ticks for job in jobs)) as bar:
        parts = -(-processes // len(jobs)) if _repairs(study) else 1
        if parts > 1:
            facts = _in_parts(jobs, parts, processes, bar)
        elif processes == 1 or len(jobs) == 1:
            facts = [work(job, bar.advance) for job in jobs]
        else:
            facts = list(_parallel(jobs, processes, bar))
    measures = facts[0]["measures"]
    other = next((f for f in facts if f["measures"] != measures), None)
    if other is not None:
        raise UsageError(f"{other['case']} and {facts[0]['case']} are of other tasks, whose measures cannot be compared")
    names = [m["name"] for m in measures]
    rows = [row for job, told in zip(jobs, facts, strict=True) for row in rows_of(job, told.get("again", {}), names)]
    methods = methods_of(study.criteria)
    result = StudyRecord(
        study=study.model_dump(mode="json"),
        machine=machine(),
        runs=facts,
        measures=measures,
        summary=summarise(rows, methods, measures),
        rows=len(rows),
        cost={"seconds": round(time.perf_counter() - started, 1), "processes": processes},
    )
    table = rows_text(rows, measures)
    measured = Measured.of_study(result, rows, methods)
    with together(out) as staged:
        checkpoint.write_text(staged.folder / "compare.csv", table)
        save_figure(study_figure(measured, result.summary), staged.folder / "compare.png")
        write_study_page(staged.folder / "report.html", result, measured)
        result.save(staged.folder / "compare.json")
    return result


def _repairs(study: Study) -> bool:
    """Whether there are cells after the one-shot ones, which do not wait for one another."""
    return study.tune is not None or study.refine is not None or bool(study.compensate)


def _in_parts(jobs: Sequence[Job], parts: int, processes: int, bar: Bar) -> list[dict[str, Any]]:
    """More processes than jobs: every job as far as its one-shot cells, then the others' cells dealt out among processes."""
    list(_parallel([replace(job, until=True) for job in jobs], processes, bar))
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(locked(job.cells))
        list(_parallel([replace(job, part=(k, parts)) for job in jobs for k in range(parts)], processes, bar))
    return [work(job, lambda: None) for job in jobs]  # everything is there


def _parallel(jobs: Sequence[Job], processes: int, bar: Bar) -> Iterator[dict[str, Any]]:
    """In the order of the jobs; ticks come through a queue, so that one bar counts for all."""
    context = multiprocessing.get_context("spawn")
    ticks: Any = context.Queue()
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_begin, initargs=(ticks, [job.run for job in jobs])
    ) as pool:
        with _interrupts_held():
            futures = [pool.submit(_remote, job) for job in jobs]
        pending: set[Future[dict[str, Any]]] = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(ticks, bar)
                for future in done:
                    future.result()  # the first failure ends it
        except BrokenProcessPool:
            raise PrunekitError(
                "a process of the study was killed, or ran out of memory; finished cells are kept, start it again"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # cells are written whole or not at all
            raise
        _drain(ticks, bar)
        yield from (future.result() for future in futures)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C comes afterwards; processes that are started inside never hear of it, from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drain(ticks: Any, bar: Bar) -> None:
    while True:
        try:
            ticks.get_nowait()
        except queue.Empty:
            return
        bar.advance()


_ticks: Any = None
"""A worker's way to say that a cell is done."""


def _begin(ticks: Any, runs: Sequence[Path]) -> None:
    """A worker says nothing, and ends with its parent, however that ends."""
    global _ticks
    _ticks = ticks
    stopping.end_with_parent()
    use_working_folder(*runs)
    warnings.simplefilter("ignore")


def _remote(job: Job) -> dict[str, Any]:
    return work(job, lambda: _ticks.put(1))


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
