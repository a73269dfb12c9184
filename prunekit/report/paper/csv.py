"""Comma-separated values: the numbers of the tables without rounding, for another program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit import checkpoint
from prunekit.report.measures import deciding
from prunekit.report.paper.grid import made, seeds_told
from prunekit.search.paper_table import Entry, PaperTable


def csv_tables(tables: Sequence[PaperTable], transposed: bool) -> str:
    """All tables in one: what a line is of, then for every sparsity (or criterion) the mean, and beside it what it is worth.

    ``std`` is empty for one seed; ``difference`` (to ``against``), its 95 % interval from ``low`` to ``high`` and ``p`` of the
    paired t-test are empty where there is none.
    """
    first = "sparsity" if transposed else "criterion"
    lines: list[dict[str, Any]] = []
    columns = ["case", "structure", "made", first, "data", "measure", "unit", "seeds", "against"]
    for table in tables:
        measure, shares = deciding(table.measures), {f"{s:g}": s for s in table.sparsities}
        for case, rows in table.cases.items():
            cells = {(name, share): rows.get(name, {}).get(s) for name in table.names for share, s in shares.items()}
            facts = {
                "case": case, "structure": table.structure, "made": made(table), "data": table.split, "measure": measure.name,
                "unit": measure.unit, "seeds": seeds_told(table.seeds[case]), "against": table.against or "best",
            }  # fmt: skip
            for line in shares if transposed else rows:
                along = table.names if transposed else shares
                found = {other: cells[(other, line) if transposed else (line, other)] for other in along}
                lines.append(
                    {**facts, first: line, **{k: v for other, cell in found.items() for k, v in _cell(other, cell).items()}}
                )
    heads = dict.fromkeys(key for line in lines for key in line if key not in columns)
    return checkpoint.csv_text([*columns, *heads], lines)


def _cell(head: str, entry: Entry | None) -> dict[str, Any]:
    if entry is None:
        return dict.fromkeys([head, *(f"{head} {what}" for what in ("std", "n", "difference", "low", "high", "p"))], "")
    test = entry.test
    figures = {"std": entry.std, "n": len(entry.figures), "difference": test and test.mean, "low": test and test.low,
               "high": test and test.high, "p": test and test.p}  # fmt: skip
    return {head: entry.mean, **{f"{head} {what}": "" if value is None else value for what, value in figures.items()}}
