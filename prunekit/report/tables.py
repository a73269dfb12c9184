"""Tables of a run's figures, for the terminal and for pages."""

from __future__ import annotations

from typing import Any

from prunekit.measure import choosing, merit
from prunekit.report.measures import Shown, by_name, shown
from prunekit.search import Comparison
from prunekit.training.record import TrainingRecord


def trained(training: TrainingRecord) -> tuple[Shown, dict[str, float]] | None:
    """The measure that a training record tells of, and its figures by split; None for a task without a measure."""
    if training.first is None:
        return None
    name, figures = training.first
    return by_name(name, training.measures), figures


def accuracy_tables(comparison: Comparison) -> list[dict[str, Any]]:
    """For each structure: figures by criterion and allocation (rows) and sparsity (columns), the best criterion's marked.

    A row's cells are in the order of ``sparsities``, None where nothing was measured. Repaired plans have a row of their own.
    """
    tables, order = [], choosing(shown(comparison.measures))
    for structure in dict.fromkeys(cell["structure"] for cell in comparison.cells):
        cells = [cell for cell in comparison.cells if cell["structure"] == structure]
        sparsities = sorted({cell["sparsity"] for cell in cells})
        own = [cell for cell in comparison.unrepaired if cell["structure"] == structure]
        best = [max((c for c in own if c["sparsity"] == s), key=lambda c: merit(order, c), default=None) for s in sparsities]
        rows: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
        for cell in cells:
            key = ("refined", "of the best") if cell["repair"] else (cell["criterion"], cell["allocation"])
            place = sparsities.index(cell["sparsity"])
            rows.setdefault(key, [None] * len(sparsities))[place] = {**cell, "best": cell is best[place]}
        tables.append({"structure": structure, "sparsities": sparsities, "rows": rows})
    return tables
