"""Markdown: a table with its caption above it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunekit.report.paper.grid import Marks, caption, grid
from prunekit.search.paper_table import PaperTable


def escaped(text: str) -> str:
    """A text that is shown as it is written."""
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", " ".join(text.split()))


def _spread(mean: str, std: str, best: bool) -> str:
    inside = f"{mean} ± {std}" if std else mean
    return f"**{inside}**" if best else inside


def _difference(number: str, stars: int) -> str:
    return f"({number}{escaped('*' * stars)})"


MARKS = Marks(escaped, _spread, _difference, "–")


def markdown_tables(tables: Sequence[PaperTable], transposed: bool) -> str:
    """The tables, one below the other; a table of several cases has a column that names them."""
    return "\n".join(_table(table, transposed) for table in tables)


def _table(table: PaperTable, transposed: bool) -> str:
    made = grid(table, transposed, MARKS)
    several = len(made.cases) > 1
    head = [*(["case"] if several else []), made.corner, *made.heads]
    rows = [[*([case] if several else []), name, *cells] for case, lines in made.cases.items() for name, cells in lines]
    rule = "|" + "---|" * len(head)
    return "\n".join([escaped(" ".join(caption(table))), "", _line(head), rule, *map(_line, rows), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
