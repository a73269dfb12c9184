"""A table for a paper as rows of text, and what has to stand above it, in whatever format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunekit.report.measures import Shown, deciding
from prunekit.search.paired_test import LEVELS
from prunekit.search.paper_table import DENSE_TUNED, Entry, PaperTable


@dataclass(frozen=True)
class Marks:
    """How a format writes what stands in a cell.

    Attributes:
        text: what a format would take for its own is written out.
        spread: ``(mean, standard deviation or "", best)``.
        difference: ``(signed difference, stars)``.
        empty: where nothing was measured.
    """

    text: Callable[[str], str]
    spread: Callable[[str, str, bool], str]
    difference: Callable[[str, int], str]
    empty: str


@dataclass(frozen=True)
class Grid:
    """Texts of a table: the corner, heads of columns, and by case the lines, each begun by its name."""

    corner: str
    heads: list[str]
    cases: dict[str, list[tuple[str, list[str]]]]


def grid(table: PaperTable, transposed: bool, marks: Marks) -> Grid:
    """The table's texts, one row a criterion, or one a sparsity."""
    measure, names = deciding(table.measures), [marks.text(name) for name in table.names]
    shares = [f"{sparsity:g}" for sparsity in table.sparsities]
    cases = {}
    for case, lines in table.cases.items():
        cells = [
            [_cell(lines.get(name, {}).get(s), len(table.seeds[case]), measure, marks) for s in table.sparsities]
            for name in table.names
        ]
        present = [name in lines for name in table.names]
        if transposed:
            cases[marks.text(case)] = [(share, [row[at] for row in cells]) for at, share in enumerate(shares)]
        else:
            cases[marks.text(case)] = [(n, row) for n, row, here in zip(names, cells, present, strict=True) if here]
    return Grid("sparsity", names, cases) if transposed else Grid("criterion", shares, cases)


def _cell(entry: Entry | None, seeds: int, measure: Shown, marks: Marks) -> str:
    if entry is None:
        return marks.empty
    std = "" if entry.std is None else number(entry.std, measure, digits=2)
    parts = [marks.spread(number(entry.mean, measure), std, entry.best)]
    if entry.test is not None:
        parts.append(marks.difference(number(entry.test.mean, measure, 3, "+"), entry.test.stars))
    if len(entry.figures) < seeds:
        parts.append(marks.text(f"[{len(entry.figures)}/{seeds}]"))
    return " ".join(parts)


def number(figure: float, measure: Shown, digits: int = 4, sign: str = "") -> str:
    """A figure in the measure's unit: ``93.2``; of one without percent so many significant ``digits``: ``0.513``."""
    return f"{figure:{sign}.1f}" if measure.unit == "%" else f"{figure:{sign}.{digits}g}"


def made(table: PaperTable) -> str:
    """``one-shot``, ``after 10 epochs of fine-tuning``."""
    return f"after {table.epochs} epoch{'s' if table.epochs > 1 else ''} of fine-tuning" if table.epochs else "one-shot"


def seeds_of(table: PaperTable) -> str:
    """``3 seeds (0, 1, 2)``, ``one seed (3)``; where cases differ, each case's."""
    told = {case: seeds_told(seeds) for case, seeds in table.seeds.items()}
    return next(iter(told.values())) if len(set(told.values())) == 1 else "; ".join(f"{case}: {of}" for case, of in told.items())


def seeds_told(seeds: list[int]) -> str:
    """``3 seeds (0, 1, 2)``, ``one seed (3)``."""
    numbers = ", ".join(map(str, seeds))
    return f"one seed ({numbers})" if len(seeds) == 1 else f"{len(seeds)} seeds ({numbers})"


def caption(table: PaperTable) -> list[str]:
    """Sentences: what is shown, on what data, over which seeds, what marks mean, and what the figures cannot say."""
    measure = deciding(table.measures)
    what = f"{table.split} {measure.title}{' in %' if measure.unit == '%' else f' ({measure.unit})' if measure.unit else ''}"
    where = f"{next(iter(table.cases))}, {table.structure}" if len(table.cases) == 1 else table.structure
    told = [f"{what[0].upper()}{what[1:]} of the pruned models ({where}), {made(table)}."]
    one = table.fewest == 1
    if all(len(seeds) == 1 for seeds in table.seeds.values()):
        told.append(f"This is {seeds_of(table)}: there is no spread and no test, and it does not show which criterion is better.")
    else:
        told.append(f"Mean ± standard deviation over {seeds_of(table)}{'; one seed has no spread' if one else ''}.")
    if table.split == "validation":
        told.append("Allocations were chosen on the same data, so figures are somewhat too good; no test data were looked at.")
    elif table.epochs == 0:
        told.append("Each criterion takes the allocation that does best on validation data.")
    told.append(
        f"Sparsity is the share of prunable parameters that was asked for"
        f"{f'; what was reached is within {table.reached:.2g} of it' if table.reached >= 0.001 else ''}."
    )
    if any(DENSE_TUNED in lines for lines in table.cases.values()):
        told.append(f"The row {DENSE_TUNED} is the dense model after the same fine-tuning.")
    return [*told, *_comparison(table), *_coverage(table)]


def _comparison(table: PaperTable) -> list[str]:
    if not any(entry.test for entry in table.entries):
        return [f"No row {table.against} is in this table, so there are no differences."] if table.against else []
    pairs = ", in pairs over the seeds" if any(len(seeds) > 1 for seeds in table.seeds.values()) else ""
    other = table.against or "it"
    told = [f"Bold: the best mean, the dense model aside. In brackets: the difference to {other}{pairs}."]
    if table.tested:
        stars = ", ".join("*" * count for count in range(1, len(LEVELS) + 1))
        levels = ", ".join(f"{level:g}" for level in LEVELS)
        freedom = {len(seeds) - 1 for seeds in table.seeds.values() if len(seeds) > 2}
        of = f" with {next(iter(freedom))} degrees of freedom" if len(freedom) == 1 else ""
        told.append(f"{stars}: p < {levels} in a two-sided paired t-test{of}, not corrected for the number of comparisons.")
    elif table.testable:
        told.append("The differences do not vary over the seeds, so there is no test.")
    elif table.fewest > 1:
        told.append("Two seeds are too few for a test.")
    return told


def _coverage(table: PaperTable) -> list[str]:
    partial = [e for case, lines in table.cases.items() for line in lines.values() for e in line.values()
               if len(e.figures) < len(table.seeds[case])]  # fmt: skip
    if not partial:
        return []
    return ["A mark such as [2/3]: measured for these seeds only, where the criterion led on validation data, so its mean is of "
            "other seeds than the others' and too good."]  # fmt: skip
