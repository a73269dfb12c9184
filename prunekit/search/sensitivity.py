"""How much each layer costs when it alone is pruned: a layer × sparsity table on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.apply import masked
from prunekit.artifact import Artifact, conform
from prunekit.criteria import Scores
from prunekit.errors import UsageError
from prunekit.plan import GROUPED, STRUCTURES, Plan
from prunekit.progress import track
from prunekit.search.compare import Candidates
from prunekit.task.evaluation import CLASSIFICATION, MeasureTold, measures_told


class LayerCell(TypedDict):
    """What a cell is; the figures of the task's measures follow."""

    layer: str
    sparsity: float
    removed: int


class SensitivityInputs(TypedDict):
    """What a table was made from; data and a task's facts beside it."""

    criterion: str
    structure: str
    sparsities: list[float]


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Artifact):
    """sensitivity-<structure>.json: figures by layer and sparsity, one layer pruned at a time.

    Attributes:
        dense: the dense model's figures.
        measures: what they are.
        cells: one a layer and sparsity: ``LayerCell`` and figures, closeness to the dense model among them. ``removed`` counts
            weights, or units.
    """

    KIND: ClassVar[str] = "sensitivity"
    CALLED: ClassVar[str] = "sensitivity"

    made_from: dict[str, Any]
    dense: dict[str, float]
    measures: list[MeasureTold] = field(default_factory=lambda: list(CLASSIFICATION))
    cells: list[dict[str, Any]]
    cost: dict[str, Any]

    def csv(self) -> str:
        """The cells as comma-separated values, one row each."""
        return checkpoint.csv_text(tuple(self.cells[0]), self.cells)

    def check(self) -> None:
        """There are cells, each with its facts and the first one's figures."""
        conform(self.made_from, SensitivityInputs, "made_from")
        figures = [key for key in self.cells[0] if key not in LayerCell.__annotations__]
        for number, cell in enumerate(self.cells):
            conform(cell, LayerCell, f"cells[{number}]")
            for name in figures:
                conform(cell[name], float, f"cells[{number}].{name}")


def sensitivity(
    candidates: Candidates,
    structure: str,
    criterion: str,
    sparsities: Sequence[float],
    made_from: Mapping[str, Any] | None = None,
) -> Sensitivity:
    """Measures the model with one layer pruned at a time, the others whole.

    Args:
        candidates: model, scores and the batches to measure on.
        structure: a layer is a parameter in an unstructured plan, and a group of units otherwise.
        criterion: decides what goes inside the layer.
        sparsities: shares to remove of the layer's weights (units), in [0, 1).
        made_from: what identifies scores and data, kept beside criterion, structure and sparsities.

    Raises:
        UsageError: a pattern, which has no sparsity to vary.
    """
    if structure != "unstructured" and structure not in GROUPED:
        raise UsageError(f"sensitivity: {structure!r} is a pattern; take one of {', '.join(STRUCTURES)}")
    whole = candidates.plan(structure, criterion, "uniform", 0.0)
    importance = _importance(candidates.scores[criterion], whole, candidates)
    grid = [(layer, sparsity) for layer in importance for sparsity in sparsities]
    cells = []
    for layer, sparsity in track(grid, "sensitivity (cells)", len(grid)):
        values = importance[layer]
        remove = min(round(sparsity * values.numel()), values.numel() - 1)
        keep = torch.ones(values.numel(), dtype=torch.bool)
        keep[torch.sort(values.flatten(), stable=True).indices[:remove]] = False
        plan = whole.edited({layer: keep.view(values.shape)})
        figures = candidates.measured(masked(candidates.model, plan))
        cells.append({"layer": layer, "sparsity": sparsity, "removed": remove, **figures})
    return Sensitivity(
        made_from={**(made_from or {}), "criterion": criterion, "structure": structure, "sparsities": list(sparsities)},
        dense=candidates.dense,
        measures=measures_told(candidates.task),
        cells=cells,
        cost={},
    )


def _importance(scores: Scores, whole: Plan, candidates: Candidates) -> Mapping[str, Tensor]:
    if not whole.index:
        return {name: scores.importance[name] for name in whole.keep}
    groups = candidates.groups[whole.structure]
    return scores.groups({group.name: group.members for group in groups if group.name in whole.keep})
