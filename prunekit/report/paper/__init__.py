"""Tables for a paper as text: LaTeX, Markdown, comma-separated values. A format is a file and a line of ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prunekit.report.paper.csv import csv_tables
from prunekit.report.paper.latex import latex_tables
from prunekit.report.paper.markdown import markdown_tables
from prunekit.search.paper_table import PaperTable

FORMATS: dict[str, Callable[[Sequence[PaperTable], bool], str]] = {
    "latex": latex_tables,
    "markdown": markdown_tables,
    "csv": csv_tables,
}
"""Name -> what writes tables so; ``transposed`` has a row for every sparsity, and a column for every criterion."""

__all__ = ["FORMATS"]
