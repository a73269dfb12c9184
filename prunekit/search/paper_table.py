"""A table for a paper: a measure by criterion and sparsity over seeds, and how criteria differ over the same seeds.

Pure arithmetic on rows. Figures are of test data where rows hold them. What is chosen (a criterion's allocation, a composition's
exponent) is chosen on validation data.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.criteria import expand
from prunekit.errors import UsageError, nearest
from prunekit.search.compare import Comparison
from prunekit.search.paired_test import FEWEST, PairedTest, paired_test
from prunekit.search.study import DENSE, StudyRecord
from prunekit.search.summary import Measures, Row, Runs, first_of

DENSE_TUNED = "dense, fine-tuned"
BEST_PLAN = "best plan"
Figures = dict[int, float]
"""Seed -> figure in the measure's unit."""


@dataclass(frozen=True)
class Measured:
    """What tables are made of.

    Attributes:
        rows: see ``prunekit.search.summary``; ``test`` only where ``split`` is that.
        methods: name -> criteria that it stands for, in the order of the rows of a table.
        measures: of the task; the first is shown.
        split: whose figures are shown.
        dense: of every case the dense model's by seed, ``epochs`` of training beyond (0 for none) -> figures.
    """

    rows: Sequence[Row]
    methods: Mapping[str, Sequence[str]]
    measures: Measures
    split: str
    dense: Mapping[str, Mapping[int, Figures]]

    @classmethod
    def of_study(cls, study: StudyRecord, rows: Sequence[Row], methods: Mapping[str, Sequence[str]]) -> Measured:
        """A study's rows, on test data."""
        name, _, scale = first_of(study.measures)
        dense: dict[str, dict[int, Figures]] = {}
        for run in study.runs:
            by_epochs = dense.setdefault(run["case"], {})
            by_epochs.setdefault(0, {})[run["seed"]] = scale * run["dense"]["test"][name]
            if tuned := run.get("dense_tuned"):
                by_epochs.setdefault(tuned["epochs"], {})[run["seed"]] = scale * tuned["test"][name]
        return cls(rows, methods, study.measures, "test", dense)

    @classmethod
    def of_run(cls, case: str, seed: int, comparison: Comparison) -> Measured:
        """A run's own comparison: one seed, on validation data."""
        name, _, scale = first_of(comparison.measures)
        told = [m["name"] for m in comparison.measures]
        rows = [
            {"case": case, "seed": seed, "control": "", "epochs": 0, "method": BEST_PLAN, **cell,
             "validation": {n: cell[n] for n in told if n in cell}}
            for cell in comparison.cells
        ]  # fmt: skip
        methods = {criterion: [criterion] for criterion in dict.fromkeys(cell["criterion"] for cell in comparison.unrepaired)}
        dense = {case: {0: {seed: scale * comparison.dense[name]}}} if name in comparison.dense else {}
        return cls(rows, methods, comparison.measures, "validation", dense)

    @property
    def names(self) -> list[str]:
        """Every row that a table of these may have."""
        repaired = (f"{row['method']}, {row['repair']}" for row in self.rows if row["repair"])
        dense = [DENSE, DENSE_TUNED] if any(len(found) > 1 for found in self.dense.values()) else [DENSE] if self.dense else []
        return list(dict.fromkeys([*self.methods, *repaired, *dense]))


@dataclass(frozen=True)
class Entry:
    """One cell of a table: figures by seed, and how they differ from the reference's.

    Attributes:
        reference: the name of the row that it is held against; None where there is none, or this is it.
        test: the paired differences; None without a reference, or seeds in common.
        best: whether its mean is the best of its case and sparsity, the dense model and what lacks seeds left out.
    """

    figures: Figures
    reference: str | None = None
    test: PairedTest | None = None
    best: bool = False

    @property
    def mean(self) -> float:
        return statistics.fmean(self.figures.values())

    @property
    def std(self) -> float | None:
        """Of a sample; None for one seed."""
        return statistics.stdev(self.figures.values()) if len(self.figures) > 1 else None


Lines = dict[str, dict[float, Entry]]
"""Row's name -> sparsity -> cell."""


@dataclass(frozen=True)
class PaperTable:
    """A table of one structure, one-shot or after fine-tuning.

    Attributes:
        epochs: of fine-tuning, 0 for one-shot.
        seeds: by case.
        against: the reference; None for the best of each case and sparsity.
        reached: how far a sparsity that was reached is from the one that was asked for, at most.
        cases: name -> rows, all of the same names and order, absent where nothing was measured.
    """

    structure: str
    epochs: int
    split: str
    measures: Measures
    sparsities: list[float]
    seeds: dict[str, list[int]]
    against: str | None
    reached: float
    cases: dict[str, Lines]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for lines in self.cases.values() for name in lines))

    @property
    def entries(self) -> list[Entry]:
        return [entry for lines in self.cases.values() for line in lines.values() for entry in line.values()]

    @property
    def fewest(self) -> int:
        """Seeds of the case that has the fewest."""
        return min(len(seeds) for seeds in self.seeds.values())

    @property
    def tested(self) -> bool:
        """Whether any cell has a test."""
        return any(entry.test is not None and entry.test.p is not None for entry in self.entries)

    @property
    def testable(self) -> bool:
        """Whether any case has seeds enough for one."""
        return any(len(seeds) >= FEWEST for seeds in self.seeds.values())


def methods_of(criteria: Sequence[str]) -> dict[str, list[str]]:
    """Criteria as a study lists them, and those that each stands for."""
    return {criterion: expand(criterion) for criterion in criteria}


def check_reference(against: str | None, names: Sequence[str]) -> None:
    """Raises UsageError where ``against`` is none of the rows."""
    if against is not None and against not in names:
        raise UsageError(f"--against is {against!r}, which is no row of the table; {nearest(against, list(names))}")


def paper_tables(measured: Measured, against: str | None = None) -> list[PaperTable]:
    """Of every structure one table of what one-shot plans come to, repaired ones among them, and one after fine-tuning.

    Args:
        against: the row that others are held against, None for the best of each case and sparsity.

    Raises:
        UsageError: no table has that row.
    """
    check_reference(against, measured.names)
    keys = dict.fromkeys((row["structure"], row["epochs"]) for row in measured.rows if not row["control"])
    structures = list(dict.fromkeys(structure for structure, _ in keys))
    ordered = sorted(keys, key=lambda key: (structures.index(key[0]), key[1]))
    return [_table(measured, structure, epochs, against) for structure, epochs in ordered]


def _table(measured: Measured, structure: str, epochs: int, against: str | None) -> PaperTable:
    rows = [row for row in measured.rows if (row["structure"], row["epochs"], row["control"]) == (structure, epochs, "")]
    sparsities, (_, sign, _) = sorted({row["sparsity"] for row in rows}), first_of(measured.measures)
    cases, seeds = {}, {}
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        figures = _one_shot(measured, case, structure) if epochs == 0 else {}
        for row in mine:
            if row["repair"] or epochs:
                name = f"{row['method']}, {row['repair']}" if row["repair"] else row["method"]
                figures.setdefault(name, {}).setdefault(row["sparsity"], {})[row["seed"]] = _figure(measured, row)
        order = [*measured.methods, *figures]
        ranked = dict(sorted(figures.items(), key=lambda item: order.index(item[0])))
        dense = measured.dense.get(case, {})
        above = {DENSE: dense.get(0), DENSE_TUNED: dense.get(epochs) if epochs else None}
        seeds[case] = sorted({row["seed"] for row in mine})
        cases[case] = {
            **{name: dict.fromkeys(sparsities, Entry(found)) for name, found in above.items() if found}, **_entries(ranked)
        }  # fmt: skip
        _hold_against(cases[case], sparsities, len(seeds[case]), against, sign)
    reached = max(abs(row["achieved"] - row["sparsity"]) for row in rows)
    return PaperTable(structure, epochs, measured.split, measured.measures, sparsities, seeds, against, reached, cases)


def _entries(figures: Mapping[str, Mapping[float, Figures]]) -> Lines:
    return {name: {s: Entry(dict(sorted(found.items()))) for s, found in line.items()} for name, line in figures.items()}


def _one_shot(measured: Measured, case: str, structure: str) -> dict[str, dict[float, Figures]]:
    """Each method's figures by sparsity, of the variant that does best on validation data in that run."""
    runs = Runs(measured.rows, case, structure, measured.methods, measured.measures)
    found: dict[str, dict[float, Figures]] = {}
    for method in measured.methods:
        for seed in runs.seeds:
            variant = runs.chosen(seed, method)
            for sparsity, figure in runs.curve(seed, variant, measured.split).items() if variant else ():
                found.setdefault(method, {}).setdefault(sparsity, {})[seed] = runs.scale * figure
    return found


def _figure(measured: Measured, row: Row) -> float:
    name, _, scale = first_of(measured.measures)
    return scale * float(row[measured.split][name])


def _hold_against(lines: Lines, sparsities: Iterable[float], seeds: int, against: str | None, sign: float) -> None:
    """Marks the best of every sparsity, and sets every other cell's test against it or the row that was named."""
    for sparsity in sparsities:
        whole = {
            name: line[sparsity] for name, line in lines.items()
            if name not in (DENSE, DENSE_TUNED) and sparsity in line and len(line[sparsity].figures) == seeds
        }  # fmt: skip
        best = max(whole, key=lambda name: sign * whole[name].mean, default=None)
        reference = best if against is None else against
        theirs: Any = lines.get(reference or "", {}).get(sparsity)
        for name, line in lines.items():
            if sparsity not in line:
                continue
            ours = line[sparsity].figures
            other = theirs is not None and name != reference and not (against is None and name in (DENSE, DENSE_TUNED))
            line[sparsity] = Entry(
                ours, reference if other else None, paired_test(ours, theirs.figures) if other else None,
                best is not None and name in whole and len(whole) > 1 and line[sparsity].mean == whole[best].mean,
            )  # fmt: skip
