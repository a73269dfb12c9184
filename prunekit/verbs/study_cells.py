"""The cells of a study: one case and seed trained, scored, measured, repaired and fine-tuned; each kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from prunekit import checkpoint, durable
from prunekit.criteria import expand, parse, score_slug
from prunekit.errors import ArtifactError
from prunekit.recipe import BY_LAYERS, Finetune, Recipe, Steps, Study
from prunekit.repair.streamed import Streaming
from prunekit.reusing import first_difference
from prunekit.search.compare import Candidates
from prunekit.search.study import (
    DENSE,
    REFINED_AGAIN,
    Cells,
    Repaired,
    StudyRun,
    compensated,
    dense_facts,
    dense_tuned,
    fine_tuned,
    one_shot,
    refined_again,
)
from prunekit.search.study_rows import SPLITS
from prunekit.search.summary import Runs, Variant
from prunekit.search.ways import RepairSamples, settings
from prunekit.steps.finetune import Finetuning
from prunekit.task.evaluation import measures_told
from prunekit.training.record import TrainingRecord
from prunekit.verbs.compensating import compensator
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scheduling import finetuning_of
from prunekit.verbs.scoring import score_run
from prunekit.verbs.training import train_run

AUTO = "auto"
AGAIN_FOLDER = REFINED_AGAIN.replace(" ", "-")
Tick = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """One case and seed, or a part of it.

    Attributes:
        recipe: trained first; None for a run folder that is there already.
        device: where it computes; the recipe's when None.
        part: ``(k, n)``: of the cells that come after the one-shot ones every n-th, from the k-th; None for all.
        until: stop before these.
    """

    case: str
    seed: int
    run: Path
    cells: Path
    study: Study
    recipe: Recipe | None
    device: str | None = None
    part: tuple[int, int] | None = None
    until: bool = False

    @cached_property
    def names(self) -> list[str]:
        """Every criterion of the study, what stands for several taken apart, each once."""
        return list(dict.fromkeys(name for criterion in self.study.criteria for name in expand(criterion)))

    @property
    def ticks(self) -> int:
        study, again = self.study, self.study.looked_at_again
        tuned = sum(len(study.tuned_at(structure)) for structure in study.structures) * again
        repaired = len(study.structures) * again if study.compensate else 0
        repairs = sum(
            (len(study.refined_at(s)) * len(study.ways_of(s)) + len(study.refined_again_at(s)))
            * len(self.repaired(s) or range(again))
            for s in study.structures
        )
        return len(self.names) * len(study.structures) + tuned + repaired + repairs + 1 + study.fine_tunes

    def repaired(self, structure: str) -> list[str]:
        """Methods whose plans are repaired; none for those that are looked at again."""
        return list(self.study.refine.of.get(structure, ())) if self.study.refine else []


def work(job: Job, tick: Tick) -> dict[str, Any]:
    """Trains, scores and measures one case and seed; returns facts about the dense model and what criteria cost.

    Raises:
        ArtifactError: another process works on these cells.
    """
    if job.part is not None:  # its cells are locked by who deals the parts out
        return _work(job, tick)
    with durable.locked(job.cells), nullcontext() if job.recipe is None else durable.locked(job.run):
        return _work(job, tick)


def _work(job: Job, tick: Tick) -> dict[str, Any]:
    study = job.study
    first = tick if job.part is None else _nothing
    if job.recipe is not None and job.part is None:
        train_run(job.recipe, job.run, announce=lambda text: None)
    run = Run(job.run, job.device)
    singles = list(dict.fromkeys(part.text for name in job.names for part in parse(name).singles))
    if job.recipe is not None and job.part is None:
        score_run(run, singles)
    scores = {name: run.scores(name) for name in job.names}
    candidates = Candidates(
        run.model, scores, run.batches("validation"), list(study.structures), run.recipe.structure.mappings(), run.task
    )
    run.model.to(run.device)
    bench = StudyRun(candidates, run.batches("test"), job.seed)
    facts = {
        "case": job.case,
        "seed": job.seed,
        "run": str(job.run),
        "samples": {name: len(split) for name, split in run.splits.items()},
        "dense": dense_facts(bench),
        "measures": measures_told(run.task),
        "steps": len(run.trajectory),
        "criteria": {name: checkpoint.read_header(run.score_path(name), "scores")["cost"] for name in singles},
    }
    if (job.run / "train.json").exists():
        facts["training_seconds"] = TrainingRecord.load(job.run / "train.json").cost["seconds"]
    first()
    data = {name: run.splits[name].digest() for name in ("validation", "test")}
    rows: list[dict[str, Any]] = []
    for structure, sparsities in study.structures.items():
        allocations = study.allocations_of(structure)
        for name in job.names:
            if scores[name].structure not in (None, structure):  # REAP's are of experts, and say nothing of heads
                tick()
                continue
            made_from = {
                "scores": scores[name].digest, "structure": structure, "allocations": allocations, "sparsities": sparsities,
                "control": study.control, "seed": job.seed, **data,
            }  # fmt: skip
            path = job.cells / structure.replace(":", "-") / f"{score_slug(name)}.json"
            rows += _cells(
                path,
                made_from,
                partial(one_shot, bench, structure, name, allocations, sparsities, study.control),
            )
            first()
    how = finetuning_of(run, Steps(finetune=Finetune(epochs=study.tune.epochs))) if study.tune else None
    if how is not None and study.fine_tunes:
        made_from = {"model": run.trajectory.hash, "epochs": how.epochs, "train": run.splits["train"].digest(), **data}
        (row,) = _cells(job.cells / f"{DENSE}-tuned" / f"{how.epochs}.json", made_from, partial(dense_tuned, bench, how))
        facts["dense_tuned"] = {"epochs": how.epochs, **{split: row[split] for split in SPLITS}}
        first()
    if (study.tune is not None or study.compensate or study.refine is not None) and not job.until:
        facts["again"] = _again(job, run, bench, rows, data, how, tick)
    return facts


def _nothing() -> None:
    """A tick that somebody else counts."""


class _Turns:
    """Whose turn it is to measure a cell, where several do."""

    def __init__(self, part: tuple[int, int] | None) -> None:
        self._part, self._seen = part or (0, 1), 0

    def mine(self) -> bool:
        """Asked once for every cell, in the same order by all."""
        self._seen += 1
        number, of = self._part
        return (self._seen - 1) % of == number


def _again(
    job: Job, run: Run, bench: StudyRun, rows: list[dict[str, Any]], data: dict[str, str], how: Finetuning | None, tick: Tick
) -> dict[str, list[str]]:
    """Repairs and fine-tunes every method's plans, or those of the leading ones on validation data and some others'.

    Returns:
        by structure, the methods that were looked at.
    """
    study, seen, turns = job.study, dict[str, list[str]](), _Turns(job.part)
    here = [{"case": job.case, "seed": job.seed, **row} for row in rows]
    compensating, compensation = compensator(run, study.compensate == BY_LAYERS, job.seed)
    repairing, repaired_from = compensator(run, False, job.seed)
    material = _material(job, run)
    stream = study.refine.stream if study.refine else None
    learnt_from = {
        "seed": job.seed,
        **({"stream": stream.model_dump(mode="json")} if stream else {}),
        "samples": [len(part) if part is not None else 0 for part in (material.learn, material.accept)],
        "calibration": run.splits["scoring"].digest(),
        "train": run.splits["train"].digest(),
    }
    for structure, sparsities in study.structures.items():
        folder = structure.replace(":", "-")
        methods = {c: expand(c) for c in dict.fromkeys([*study.criteria, *study.always])}
        runs = Runs(here, job.case, structure, methods, measures_told(run.task))
        chosen = {method: variant for method in runs.methods if (variant := runs.chosen(job.seed, method)) is not None}
        order = sorted(chosen, key=lambda m: -runs.sign * runs.area(runs.curve(job.seed, chosen[m], "validation")))
        leading = [m for m in order if m not in study.always][: study.leading]
        few = list(dict.fromkeys([*leading, *(m for m in study.always if m in chosen)]))
        looked_at = seen[structure] = few if study.leading is not None else [m for m in study.criteria if m in chosen]

        def made_from(method: str, variant: Variant, structure: str = structure) -> dict[str, Any]:
            return {
                "scores": bench.candidates.scores[variant[0]].digest, "structure": structure, "allocation": variant[1],
                "method": method, **data,
            }  # fmt: skip

        for method in looked_at:
            name, allocation = chosen[method]
            if study.compensate and turns.mine():
                _cells(
                    job.cells / f"{folder}-compensated" / f"{_method_slug(method)}.json",
                    {**made_from(method, chosen[method]), "sparsities": sparsities, **compensation},
                    partial(compensated, bench, structure, method, name, allocation, sparsities, compensating),
                )  # fmt: skip
                tick()
            for sparsity in study.tuned_at(structure):
                if not turns.mine():
                    continue
                assert how is not None
                _cells(
                    job.cells / f"{folder}-tuned" / f"{_method_slug(method)}-{sparsity:g}.json",
                    {**made_from(method, chosen[method]), "sparsity": sparsity, "epochs": how.epochs,
                     "train": run.splits["train"].digest()},
                    partial(fine_tuned, bench, structure, method, name, allocation, sparsity, how),
                )  # fmt: skip
                tick()
        auto = {sparsity: (row["criterion"], row["allocation"]) for sparsity, row in runs.auto(job.seed).items()}
        for sparsity in study.refined_at(structure):
            for method in job.repaired(structure) or looked_at:
                variant = auto[sparsity] if method == AUTO else chosen[method]
                for way in study.ways_of(structure):
                    if not turns.mine():
                        continue
                    assert study.refine is not None
                    tuning = how if way in study.refine.tune and sparsity in study.tuned_at(structure) else None
                    repaired = Repaired(bench, structure, method, *variant, sparsity, way, material)
                    file = f"{_method_slug(method)}-{sparsity:g}.json"
                    asked = {**made_from(method, variant), **learnt_from, **settings(way, structure), "sparsity": sparsity}
                    _cells(
                        job.cells / f"{folder}-{way}" / file,
                        {**asked, "epochs": tuning.epochs if tuning else 0},
                        partial(repaired.rows, tuning),
                    )
                    if study.refine.compensate:
                        _cells(
                            job.cells / f"{folder}-{way}-compensated" / file,
                            {**asked, **repaired_from},
                            partial(repaired.compensated, repairing),
                        )
                    tick()
                if sparsity in study.refined_again_at(structure) and turns.mine():
                    assert how is not None
                    assert study.refine is not None
                    again = study.refine.again
                    _cells(
                        job.cells / f"{folder}-{AGAIN_FOLDER}" / f"{_method_slug(method)}-{sparsity:g}-{again}.json",
                        {**made_from(method, variant), **learnt_from, "sparsity": sparsity, "epochs": how.epochs, "again": again},
                        partial(refined_again, bench, structure, method, *variant, sparsity, material, how, again),
                    )
                    tick()
    return seen


def _material(job: Job, run: Run) -> RepairSamples:
    """What repairs look at: see ``recipe.Repairs.samples``."""
    refine = job.study.refine
    samples = refine.samples if refine else None
    learn, accept = run.evidence.samples(), None
    if samples is not None:
        learn, accept = run.batches("train", samples), learn
    stream = Streaming(**refine.stream.model_dump()) if refine and refine.stream else None
    return RepairSamples(run.evidence, learn, accept, run.example, job.seed, stream, run.batches("train"))


def _method_slug(method: str) -> str:
    if method == AUTO:
        return AUTO
    names = expand(method)
    return score_slug(names[0]) if len(names) == 1 else f"tempered-{score_slug(names[-1])}"


def _cells(path: Path, made_from: Mapping[str, Any], measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows from the file, if it was made from the same; else measured and written."""
    if path.exists():
        try:
            found = Cells.load(path)
            if first_difference(found.made_from, made_from) is None:
                return found.rows
        except ArtifactError:
            pass  # damaged: measured again, and replaced
    rows = measure()
    Cells(made_from=dict(made_from), rows=rows).save(path)
    return rows


def rows_of(job: Job, again: Mapping[str, Collection[str]], measures: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every row of a job that belongs to its study.

    Args:
        again: by structure, the methods that were looked at again.

    Raises:
        ArtifactError: a file of cells is missing, damaged, or lacks one of the task's ``measures``; names it.
    """
    for structure in job.study.structures:
        folder = structure.replace(":", "-")
        for name in job.names:
            for row in _read(job.cells / folder / f"{score_slug(name)}.json", measures):
                yield {"case": job.case, "seed": job.seed, **row}
        ways = job.study.ways_of(structure)
        kinds = ["compensated", "tuned", *ways, *(f"{way}-compensated" for way in ways), AGAIN_FOLDER]
        methods = again.get(structure, ())
        for path in (path for kind in kinds for path in sorted((job.cells / f"{folder}-{kind}").glob("*.json"))):
            for row in _read(path, measures):
                repaired = row["repair"] not in ("", "compensated")
                if row["method"] in ((job.repaired(structure) or methods) if repaired else methods) and _belongs(row, job.study):
                    yield {"case": job.case, "seed": job.seed, **row}


def _read(path: Path, measures: Collection[str]) -> list[dict[str, Any]]:
    rows = Cells.load(path).rows
    for lost in (name for row in rows for name in measures if name not in row["validation"] or name not in row["test"]):
        raise ArtifactError(f"{path}: not a whole file of cells (a row lacks {lost}); remove it, and it is measured again")
    return rows


def _belongs(row: Mapping[str, Any], study: Study) -> bool:
    """Whether a repaired or fine-tuned row is one that this study asks for: cells of an earlier one may lie there too."""
    if row["repair"] == "compensated":
        return bool(study.compensate) and row["sparsity"] in study.structures[row["structure"]]
    if row["repair"] == REFINED_AGAIN and (study.refine is None or row["again"] != study.refine.again):
        return False
    if row["repair"].endswith("+compensated") and not (study.refine and study.refine.compensate):
        return False
    tune = study.tune
    tuned = not row["epochs"] or (
        tune is not None and row["epochs"] == tune.epochs and row["sparsity"] in study.tuned_at(row["structure"])
    )
    return tuned and (not row["repair"] or row["sparsity"] in study.refined_at(row["structure"]))
