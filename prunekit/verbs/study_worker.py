"""A study's worker: makes a run of a case and seed ready, and measures cells of it. Plain data come, and plain data go back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from prunekit import checkpoint, durable
from prunekit.criteria import expand, parse
from prunekit.recipe import BY_LAYERS, Finetune, Recipe, Steps, Study
from prunekit.repair.streamed import Streaming
from prunekit.search.compare import Candidates
from prunekit.search.study import (
    Repaired,
    StudyRun,
    compensated,
    dense_facts,
    dense_tuned,
    fine_tuned,
    one_shot,
    refined_again,
)
from prunekit.search.ways import RepairSamples
from prunekit.steps.finetune import Finetuning
from prunekit.task.evaluation import measures_told
from prunekit.training.record import TrainingRecord
from prunekit.verbs.compensating import compensator
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scoring import score_run
from prunekit.verbs.study_travel import WIRE, Files, Lacking, Source, packed, place, sees
from prunekit.verbs.training import train_run
from prunekit.verbs.tuning import finetuning_of

Rows = list[dict[str, Any]]
_one = threading.Lock()
"""A process does one piece at a time: torch's random state and a model under masks are shared by its threads."""


def names_of(study: Study) -> list[str]:
    """Every criterion of a study, what stands for several taken apart, each once."""
    return list(dict.fromkeys(name for criterion in study.criteria for name in expand(criterion)))


def prepare(source: Source, files: Files | None = None) -> tuple[dict[str, Any], Files | None] | Lacking:
    """Trains and scores, where that is asked for and not done.

    Returns:
        what cells are measured from, ``facts`` about the dense model and what criteria cost among it; and the run's files,
        where they are others than the coordinator has.

    Raises:
        ArtifactError: another process works on the run, or it is too large to travel.
    """
    with _one:
        here = place(source, files)
        if here is None:
            return Lacking()
        names = names_of(Study.of(source.study, "study"))
        singles = list(dict.fromkeys(part.text for name in names for part in parse(name).singles))
        if source.recipe is not None:
            with durable.locked(here):
                recipe = Recipe.of(source.recipe, f"{source.case}'s recipe")
                train_run(recipe, here, announce=lambda text: None, most=None if sees(source) else WIRE)
                score_run(Run(here, source.device), singles)
        _opened.clear()
        found = _open(source, here).told(singles)
        made = None if sees(source) else packed(here)
        return found, None if made == files else made


def measure(source: Source, kind: str, options: dict[str, Any], files: Files | None = None) -> list[Rows] | Lacking:
    """The rows of one cell, by the file that they belong in; ``kind`` is of ``KINDS``, ``options`` its arguments."""
    with _one:
        here = place(source, files)
        return Lacking() if here is None else KINDS[kind](_open(source, here), **options)


# -- an opened run ---------------------------------------------------------------------------------------------


class Opened:
    """A run of a study, with what its cells are measured with."""

    def __init__(self, source: Source, here: Path) -> None:
        self.case, self.seed, self.path = source.case, source.seed, here
        self.study = Study.of(source.study, "study")
        self.names = names_of(self.study)
        self.run = run = Run(here, source.device)
        self.scores = {name: run.scores(name) for name in self.names}
        structures = list(self.study.structures)
        candidates = Candidates(
            run.model, self.scores, run.batches("validation"), structures, run.recipe.structure.mappings(), run.task
        )
        run.model.to(run.device)
        self.bench = StudyRun(candidates, run.batches("test"), self.seed)

    @cached_property
    def how(self) -> Finetuning | None:
        tune = self.study.tune
        return finetuning_of(self.run, Steps(finetune=Finetune(epochs=tune.epochs))) if tune else None

    @cached_property
    def compensating(self) -> tuple[Any, dict[str, Any]]:
        return compensator(self.run, self.study.compensate == BY_LAYERS, self.seed)

    @cached_property
    def repairing(self) -> tuple[Any, dict[str, Any]]:
        return compensator(self.run, False, self.seed)

    @cached_property
    def material(self) -> RepairSamples:
        """What repairs look at: see ``recipe.Repairs.samples``."""
        refine, run = self.study.refine, self.run
        samples = refine.samples if refine else None
        learn, accept = run.evidence.samples(), None
        if samples is not None:
            learn, accept = run.batches("train", samples), learn
        stream = Streaming(**refine.stream.model_dump()) if refine and refine.stream else None
        return RepairSamples(run.evidence, learn, accept, run.example, self.seed, stream, run.batches("train"))

    def told(self, singles: list[str]) -> dict[str, Any]:
        """What a coordinator needs to know of a run: ``facts`` for the study's record, the rest decides cells."""
        run, study = self.run, self.study
        facts = {
            "case": self.case,
            "seed": self.seed,
            "samples": {name: len(split) for name, split in run.splits.items()},
            "dense": dense_facts(self.bench),
            "measures": measures_told(run.task),
            "steps": len(run.trajectory),
            "criteria": {name: checkpoint.read_header(run.score_path(name), "scores")["cost"] for name in singles},
        }
        if (self.path / "train.json").exists():
            facts["training_seconds"] = TrainingRecord.load(self.path / "train.json").cost["seconds"]
        found = {
            "facts": facts,
            "scores": {
                name: {"digest": scores.digest, "unfit": [each for each in study.structures if scores.unsuited(each) is not None]}
                for name, scores in self.scores.items()
            },
            "data": {name: run.splits[name].digest() for name in ("validation", "test")},
        }
        if study.tune is not None or study.compensate or study.refine is not None:
            found |= {
                "model": run.trajectory.hash,
                "train": run.splits["train"].digest(),
                "scoring": run.splits["scoring"].digest(),
                "epochs": self.how.epochs if self.how else None,
                "compensation": self.compensating[1],
                "repaired_from": self.repairing[1],
                "samples": [
                    len(part) if part is not None else 0 for part in (self.material.learn, self.material.accept)
                ],
            }  # fmt: skip
        return found


_opened: dict[tuple[str, str], Opened] = {}
"""The run that this process looked at last."""


def _open(source: Source, here: Path) -> Opened:
    key = (str(here), repr(source))
    if key not in _opened:
        _opened.clear()
        _opened[key] = Opened(source, here)
    return _opened[key]


# -- kinds of cells --------------------------------------------------------------------------------------------


def _one_shot(run: Opened, structure: str, criterion: str) -> list[Rows]:
    study = run.study
    allocations, sparsities = study.allocations_of(structure, criterion), study.structures[structure]
    return [one_shot(run.bench, structure, criterion, allocations, sparsities, study.control)]


def _dense_tuned(run: Opened) -> list[Rows]:
    assert run.how is not None
    return [dense_tuned(run.bench, run.how)]


def _compensated(run: Opened, structure: str, method: str, variant: tuple[str, str]) -> list[Rows]:
    sparsities = run.study.structures[structure]
    return [compensated(run.bench, structure, method, *variant, sparsities, run.compensating[0])]


def _fine_tuned(run: Opened, structure: str, method: str, variant: tuple[str, str], sparsity: float) -> list[Rows]:
    assert run.how is not None
    return [fine_tuned(run.bench, structure, method, *variant, sparsity, run.how)]


def _repaired(
    run: Opened, structure: str, method: str, variant: tuple[str, str], sparsity: float, way: str, tuned: bool, parts: list[str]
) -> list[Rows]:
    """``parts``: of ``rows`` and ``compensated`` those that are wanted."""
    repaired = Repaired(run.bench, structure, method, *variant, sparsity, way, run.material)
    measured: dict[str, Callable[[], Rows]] = {
        "rows": lambda: repaired.rows(run.how if tuned else None),
        "compensated": lambda: repaired.compensated(run.repairing[0]),
    }
    return [measured[part]() for part in parts]


def _refined_again(run: Opened, structure: str, method: str, variant: tuple[str, str], sparsity: float) -> list[Rows]:
    assert run.how is not None
    assert run.study.refine is not None
    again = run.study.refine.again
    return [refined_again(run.bench, structure, method, *variant, sparsity, run.material, run.how, again)]


KINDS: dict[str, Callable[..., list[Rows]]] = {
    "one_shot": _one_shot,
    "dense_tuned": _dense_tuned,
    "compensated": _compensated,
    "fine_tuned": _fine_tuned,
    "repaired": _repaired,
    "refined_again": _refined_again,
}
