"""Which criterion and allocation to take: the best on validation data at the asked sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.errors import UsageError
from prunekit.measure import merit
from prunekit.plan import choices
from prunekit.progress import track
from prunekit.search.compare import Candidates, Comparison


def choose(
    candidates: Candidates,
    comparison: Comparison | None,
    structure: str,
    sparsity: float,
    allocations: Sequence[str],
) -> dict[str, Any]:
    """The winning cell; taken from ``comparison`` when it holds this structure and sparsity, else measured now.

    Args:
        comparison: made from the same scores and validation samples, or None.

    Raises:
        UsageError: all scores are of another structure.
    """
    cells = [
        cell
        for cell in (comparison.unrepaired if comparison and comparison.fits(candidates.task) else [])
        if cell["structure"] == structure
        and cell["sparsity"] == sparsity
        and cell["allocation"] in allocations
        and cell["criterion"] in candidates.scores
    ]
    fitting = [name for name, scores in candidates.scores.items() if scores.unsuited(structure) is None]
    if not fitting:
        raise UsageError(f"auto: none of {', '.join(candidates.scores)} scores {structure}; score another criterion first")
    wanted = [(c, a) for c in fitting for a, _ in choices(structure, allocations, [sparsity])]
    if len(cells) != len(wanted):
        cells = [
            candidates.cell(structure, criterion, allocation, sparsity)
            for criterion, allocation in track(wanted, "auto (candidates)", len(wanted))
        ]
    return max(cells, key=lambda cell: merit(candidates.task.choosing, cell))
