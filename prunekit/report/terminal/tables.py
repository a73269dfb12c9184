"""Tables for people, on stdout."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from prunekit.report.measures import Shown


def print_table(table: Table) -> None:
    console = Console(highlight=False, color_system=None)  # no escapes of its own, since none is let through (cli/output.py)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width; the default of 80 would break rows
    if table.title:
        print(table.title)  # not the table's own: that is wrapped to the table's width
        table.title = None
    console.print(table)


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def again(reused: bool) -> str:
    return " (unchanged, reused)" if reused else ""


def in_unit(measure: Shown) -> str:
    """``accuracy in %``, ``RMSE ↓``."""
    return f"{measure.title} in {measure.unit}" if measure.unit else measure.title
