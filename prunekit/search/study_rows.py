"""A study's compare.csv: one line for every pruned model that was measured, written and read."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from prunekit import bounded, checkpoint
from prunekit.remote import Place
from prunekit.search.summary import Measures, Row

SPLITS = ("validation", "test")
NUMBERS: dict[str, type] = {"seed": int, "sparsity": float, "epochs": int, "achieved": float}
TEXTS = ("case", "structure", "criterion", "allocation", "control", "method", "repair")
COLUMNS = (
    "case", "seed", "structure", "criterion", "allocation", "sparsity", "control", "method", "repair", "epochs",
    "achieved", "achieved_all", "seconds",
)  # fmt: skip


def rows_text(rows: Iterable[Row], measures: Measures) -> str:
    """The file's text: ``COLUMNS``, then ``validation_accuracy`` … of every measure."""
    columns = (*COLUMNS, *(f"{split}_{m['name']}" for split in SPLITS for m in measures))
    return checkpoint.csv_text(columns, [_flat(row, measures) for row in rows])


def _flat(row: Row, measures: Measures) -> dict[str, Any]:
    given = {"method": "", "seconds": "", **row}
    return {**given, **{f"{split}_{m['name']}": row[split][m["name"]] for split in SPLITS for m in measures}}


def read_rows(path: Place, measures: Measures) -> list[dict[str, Any]]:
    """The rows of a file, as ``prunekit.search.summary`` has them; of their figures those of ``measures``.

    Raises:
        ArtifactError: it is missing, or is no such table; names the file and the line.
    """
    with checkpoint.reading(path, "table of a study"):
        reader = csv.DictReader(io.StringIO(bounded.text(path, bounded.JSON)), strict=True)
        try:
            return [_row(line, number, measures) for number, line in enumerate(reader, 2)]
        except csv.Error:
            raise ValueError(f"line {reader.line_num + 1} is no line of comma-separated values") from None


def _row(line: Mapping[str, str | None], number: int, measures: Measures) -> dict[str, Any]:
    def text(column: str) -> str:
        found = line.get(column)
        if found is None:
            raise ValueError(f"line {number} has no {column}")
        return found

    def value(column: str, kind: type = float) -> Any:
        given = text(column)
        try:
            found = kind(given)
        except ValueError:
            raise ValueError(f"line {number}: {column} is {given[:40]!r}, no number") from None
        if not math.isfinite(found):
            raise ValueError(f"line {number}: {column} is {found}")
        return found

    return {
        **{column: text(column) for column in TEXTS},
        **{column: value(column, kind) for column, kind in NUMBERS.items()},
        **{split: {m["name"]: value(f"{split}_{m['name']}") for m in measures} for split in SPLITS},
    }
