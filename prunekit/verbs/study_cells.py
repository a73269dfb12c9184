"""The cells of a study: which there are for a case and seed, what each is made from, and the files that keep their rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prunekit.criteria import expand, score_slug
from prunekit.errors import ArtifactError
from prunekit.recipe import Recipe, Study
from prunekit.reusing import first_difference
from prunekit.search.study import DENSE, REFINED_AGAIN, Cells
from prunekit.search.study_rows import SPLITS
from prunekit.search.summary import Runs, Variant
from prunekit.search.ways import settings
from prunekit.verbs.study_worker import Rows, names_of

AUTO = "auto"
AGAIN_FOLDER = REFINED_AGAIN.replace(" ", "-")


@dataclass(frozen=True)
class Job:
    """One case and seed.

    Attributes:
        cells: the folder that keeps their rows.
        recipe: trained first; None for a run folder that is there already.
        device: where it computes; the recipe's when None.
    """

    case: str
    seed: int
    run: Path
    cells: Path
    study: Study
    recipe: Recipe | None
    device: str | None = None

    @property
    def name(self) -> str:
        return f"{self.case}, seed {self.seed}"

    @cached_property
    def names(self) -> list[str]:
        """Every criterion of the study, what stands for several taken apart, each once."""
        return names_of(self.study)

    @property
    def pieces(self) -> int:
        """How many pieces of work it is, at most."""
        study, again = self.study, self.study.looked_at_again
        tuned = sum(len(study.tuned_at(structure)) for structure in study.structures) * again
        repaired = len(study.structures) * again if study.compensate else 0
        repairs = 0
        for structure in study.structures:
            for method in self.repaired(structure) or [""] * again:
                ways = [way for at in study.refined_at(structure) for way in study.ways_of(structure, method, at)]
                repairs += len(ways) + len(study.refined_again_at(structure, method))
        return len(self.names) * len(study.structures) + tuned + repaired + repairs + 1 + study.fine_tunes

    def repaired(self, structure: str) -> list[str]:
        """Methods whose plans are repaired; none for those that are looked at again."""
        return list(self.study.refine.of.get(structure, ())) if self.study.refine else []


@dataclass
class Cell:
    """Rows that are measured together.

    Attributes:
        kind, options: for ``study_worker.measure``.
        files: what keeps them -> what they are made from.
        rows: by file, those that are there.
    """

    name: str
    kind: str
    options: dict[str, Any]
    files: dict[Path, dict[str, Any]]
    rows: dict[Path, Rows] = field(default_factory=dict)

    def read(self, measures: Collection[str]) -> None:
        """Takes the rows of files that were made from the same."""
        for path, made_from in self.files.items():
            if (found := _read(path, made_from, measures)) is not None:
                self.rows[path] = found

    @property
    def missing(self) -> list[Path]:
        return [path for path in self.files if path not in self.rows]

    def asked(self) -> dict[str, Any]:
        """The options of what is missing."""
        if "parts" not in self.options:
            return self.options
        parts = [part for part, path in zip(self.options["parts"], self.files, strict=True) if path not in self.rows]
        return {**self.options, "parts": parts}

    def keep(self, measured: list[Rows]) -> None:
        """Writes what was missing."""
        for path, rows in zip(self.missing, measured, strict=True):
            Cells(made_from=dict(self.files[path]), rows=rows).save(path)
            self.rows[path] = rows


def _read(path: Path, made_from: Mapping[str, Any], measures: Collection[str]) -> Rows | None:
    if not path.exists():
        return None
    try:
        found = Cells.load(path)
    except ArtifactError:
        return None  # damaged: measured again, and replaced
    whole = all(name in row[split] for row in found.rows for split in SPLITS for name in measures)
    return found.rows if whole and first_difference(found.made_from, made_from) is None else None


def one_shot_cells(job: Job, told: Mapping[str, Any]) -> Iterator[Cell]:
    """No weight updated: one cell a structure and criterion; and the dense model trained on, where anything is.

    Args:
        told: by ``study_worker.prepare``.
    """
    study = job.study
    for structure, sparsities in study.structures.items():
        for name in job.names:
            score = told["scores"][name]
            if structure in score["unfit"]:  # REAP's are of experts, and say nothing of heads
                continue
            made_from = {
                "scores": score["digest"], "structure": structure, "allocations": study.allocations_of(structure, name),
                "sparsities": sparsities, "control": study.control, "seed": job.seed, **told["data"],
            }  # fmt: skip
            path = job.cells / structure.replace(":", "-") / f"{score_slug(name)}.json"
            yield Cell(f"{structure} {name}", "one_shot", {"structure": structure, "criterion": name}, {path: made_from})
    if study.fine_tunes:
        epochs = told["epochs"]
        made_from = {"model": told["model"], "epochs": epochs, "train": told["train"], **told["data"]}
        path = job.cells / f"{DENSE}-tuned" / f"{epochs}.json"
        yield Cell("dense model trained on", "dense_tuned", {}, {path: made_from})


def later_cells(job: Job, told: Mapping[str, Any], rows: Rows) -> tuple[list[Cell], dict[str, list[str]]]:
    """Plans repaired and fine-tuned: every method's, or those of the leading ones on validation data and some others'.

    Args:
        rows: the one-shot ones.

    Returns:
        the cells; and by structure, the methods that were looked at.
    """
    study = job.study
    if study.tune is None and not study.compensate and study.refine is None:
        return [], {}
    cells, seen = list[Cell](), dict[str, list[str]]()
    measures = told["facts"]["measures"]
    here = [{"case": job.case, "seed": job.seed, **row} for row in rows]
    for structure in study.structures:
        methods = {c: expand(c) for c in dict.fromkeys([*study.criteria, *study.always])}
        runs = Runs(here, job.case, structure, methods, measures)
        chosen = {method: variant for method in runs.methods if (variant := runs.chosen(job.seed, method)) is not None}
        order = sorted(chosen, key=lambda m: -runs.sign * runs.area(runs.curve(job.seed, chosen[m], "validation")))
        leading = [m for m in order if m not in study.always][: study.leading]
        few = list(dict.fromkeys([*leading, *(m for m in study.always if m in chosen)]))
        seen[structure] = few if study.leading is not None else [m for m in study.criteria if m in chosen]
        later = _Later(job, told, structure)
        for method in seen[structure]:
            cells += later.of_method(method, chosen[method])
        auto = {sparsity: (row["criterion"], row["allocation"]) for sparsity, row in runs.auto(job.seed).items()}
        for sparsity in study.refined_at(structure):
            for method in job.repaired(structure) or seen[structure]:
                cells += later.repaired(method, auto[sparsity] if method == AUTO else chosen[method], sparsity)
    return cells, seen


@dataclass
class _Later:
    """Cells of one structure that come after the one-shot ones."""

    job: Job
    told: Mapping[str, Any]
    structure: str

    def of_method(self, method: str, variant: Variant) -> Iterator[Cell]:
        study, structure, told = self.job.study, self.structure, self.told
        options = {"structure": structure, "method": method, "variant": variant}
        if study.compensate:
            asked = {**self._made_from(method, variant), "sparsities": study.structures[structure], **told["compensation"]}
            yield self._cell("compensated", method, options, {self._path("compensated", f"{method_slug(method)}.json"): asked})
        for sparsity in study.tuned_at(structure):
            path = self._path("tuned", f"{method_slug(method)}-{sparsity:g}.json")
            tuned = {"sparsity": sparsity, "epochs": told["epochs"], "train": told["train"]}
            made_from = {**self._made_from(method, variant), **tuned}
            yield self._cell("fine_tuned", method, {**options, "sparsity": sparsity}, {path: made_from})

    def repaired(self, method: str, variant: Variant, sparsity: float) -> Iterator[Cell]:
        study, structure, told, refine = self.job.study, self.structure, self.told, self.job.study.refine
        assert refine is not None
        options = {"structure": structure, "method": method, "variant": variant, "sparsity": sparsity}
        learnt_from = {
            "seed": self.job.seed,
            **({"stream": refine.stream.model_dump(mode="json")} if refine.stream else {}),
            "samples": told["samples"],
            "calibration": told["scoring"],
            "train": told["train"],
        }
        file = f"{method_slug(method)}-{sparsity:g}"
        for way in study.ways_of(structure, method, sparsity):
            tuned = way in refine.tune and sparsity in study.tuned_at(structure)
            asked = {**self._made_from(method, variant), **learnt_from, **settings(way, structure), "sparsity": sparsity}
            files = {self._path(way, f"{file}.json"): {**asked, "epochs": told["epochs"] if tuned else 0}}
            if refine.compensate:
                files[self._path(f"{way}-compensated", f"{file}.json")] = {**asked, **told["repaired_from"]}
            parts = ["rows", "compensated"][: len(files)]
            yield self._cell("repaired", method, {**options, "way": way, "tuned": tuned, "parts": parts}, files)
        if sparsity in study.refined_again_at(structure, method):
            path = self._path(AGAIN_FOLDER, f"{file}-{refine.again}.json")
            again = {"sparsity": sparsity, "epochs": told["epochs"], "again": refine.again}
            made_from = {**self._made_from(method, variant), **learnt_from, **again}
            yield self._cell("refined_again", method, options, {path: made_from})

    def _made_from(self, method: str, variant: Variant) -> dict[str, Any]:
        return {
            "scores": self.told["scores"][variant[0]]["digest"], "structure": self.structure, "allocation": variant[1],
            "method": method, **self.told["data"],
        }  # fmt: skip

    def _path(self, kind: str, file: str) -> Path:
        return self.job.cells / f"{self.structure.replace(':', '-')}-{kind}" / file

    def _cell(self, kind: str, method: str, options: dict[str, Any], files: dict[Path, dict[str, Any]]) -> Cell:
        at = f" at {options['sparsity']:g}" if "sparsity" in options else ""
        how = options.get("way", kind.replace("_", " "))
        return Cell(f"{self.structure} {method}, {how}{at}", kind, options, files)


def method_slug(method: str) -> str:
    if method == AUTO:
        return AUTO
    names = expand(method)
    return score_slug(names[0]) if len(names) == 1 else f"tempered-{score_slug(names[-1])}"
