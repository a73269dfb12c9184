"""Every criterion against every other: each allocation and sparsity, one-shot, on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.apply import masked
from prunekit.criteria import Scores
from prunekit.errors import ArtifactError
from prunekit.measure import accuracy, fidelity, predict
from prunekit.plan import GROUPED, Plan, choices, plan_from
from prunekit.progress import Bar
from prunekit.structure import Group, find_groups
from prunekit.structure.heads import Mappings

SCHEMA = 1
COLUMNS = ("structure", "criterion", "allocation", "sparsity", "achieved", "achieved_all", "accuracy", "agreement", "kl")


@dataclass(frozen=True)
class Comparison:
    """One row a cell (``COLUMNS``), the dense model's validation accuracy, and what it was made from."""

    cells: list[dict[str, Any]]
    dense_accuracy: float
    made_from: dict[str, Any]
    cost: dict[str, Any]

    def best(self, structure: str, sparsity: float) -> dict[str, Any] | None:
        """The cell with the highest accuracy there (ties: agreement, then KL, then order); None if there is none."""
        cells = [c for c in self.cells if c["structure"] == structure and c["sparsity"] == sparsity]
        return max(cells, key=merit) if cells else None

    def csv(self) -> str:
        """The cells as comma-separated values, one row each."""
        return checkpoint.csv_text(COLUMNS, self.cells)

    def save(self, path: Path) -> None:
        """Writes ``path`` as JSON."""
        checkpoint.write_json(
            path,
            {
                "schema": SCHEMA,
                "kind": "comparison",
                "made_from": self.made_from,
                "dense": {"accuracy": self.dense_accuracy},
                "cells": self.cells,
                "cost": self.cost,
            },
        )

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Raises ArtifactError when the file is missing, damaged, or of a newer schema."""
        found = checkpoint.read_json(path, "comparison")
        with checkpoint.reading(path, "comparison"):
            if found["schema"] != SCHEMA:
                raise ArtifactError(f"{path}: schema {found['schema']}, this prunekit reads {SCHEMA}")
            for cell in found["cells"]:
                [cell[column] for column in COLUMNS]
            if not found["cells"]:
                raise ValueError("no cells")
            return cls(found["cells"], float(found["dense"]["accuracy"]), dict(found["made_from"]), dict(found["cost"]))


def merit(cell: Mapping[str, Any]) -> tuple[float, float, float]:
    """What makes one cell better than another: accuracy, then agreement with the dense model, then lower KL."""
    return cell["accuracy"], cell["agreement"], -cell["kl"]


class Candidates:
    """Plans for one model and their measured cells; the model is traced and run densely once."""

    def __init__(
        self,
        model: nn.Module,
        scores: Mapping[str, Scores],
        batches: Sequence[tuple[Tensor, Tensor]],
        structures: Sequence[str],
        attention: Mappings = (),
    ) -> None:
        self.model, self.scores, self.batches = model, scores, batches
        self.groups: dict[str, Sequence[Group]] = {
            name: find_groups(name, model, batches[0][0][:2], attention) for name in structures if name in GROUPED
        }
        self.dense, self.labels = predict(model, batches)

    def plan(self, structure: str, criterion: str, allocation: str, sparsity: float) -> Plan:
        return plan_from(self.scores[criterion], self.model, self.groups.get(structure, ()), sparsity, structure, allocation)

    def cell(self, structure: str, criterion: str, allocation: str, sparsity: float) -> dict[str, Any]:
        """Makes the plan, runs the masked model (which computes what the cut one does), and measures it."""
        plan = self.plan(structure, criterion, allocation, sparsity)
        outputs, labels = predict(masked(self.model, plan), self.batches)
        reached = plan.sparsity()
        return {
            "structure": structure,
            "criterion": criterion,
            "allocation": allocation,
            "sparsity": sparsity,
            "achieved": reached["prunable"],
            "achieved_all": reached["all"],
            **fidelity(outputs, labels, self.dense),
        }


def compare(
    model: nn.Module,
    scores: Mapping[str, Scores],
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    structures: Sequence[str],
    allocations: Sequence[str],
    sparsities: Sequence[float],
    made_from: Mapping[str, Any] | None = None,
    attention: Mappings = (),
) -> Comparison:
    """Measures every criterion × allocation × sparsity of every structure on ``batches`` (validation data).

    Args:
        model: the dense model that ``scores`` were made from.
        scores: by criterion name.
    """
    candidates = Candidates(model, scores, batches, structures, attention)
    grid = [(s, c, a, p) for s in structures for c in scores for a, p in choices(s, allocations, sparsities)]
    cells = []
    with Bar("compare (cells)", len(grid)) as bar:
        for structure, criterion, allocation, sparsity in grid:
            cells.append(candidates.cell(structure, criterion, allocation, sparsity))
            bar.advance()
    return Comparison(cells, accuracy(candidates.dense, candidates.labels), dict(made_from or {}), {})
