"""Every criterion against every other, in each allocation and sparsity, and the best repaired: one-shot, on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from prunekit.structure import Group, find_groups, implied_sparsity
from prunekit.structure.heads import Mappings

SCHEMA = 1
REFINED = "refined"
COLUMNS = (
    "structure", "criterion", "allocation", "sparsity", "repair", "achieved", "achieved_all", "accuracy", "agreement", "kl"
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One row a cell (``COLUMNS``), the dense model's validation accuracy, and what it was made from.

    A cell's ``repair`` is empty, or ``refined``: what ``refine`` made of the best plan there, which has that criterion and
    allocation. Choices are made among the others.
    """

    cells: list[dict[str, Any]]
    dense_accuracy: float
    made_from: dict[str, Any]
    cost: dict[str, Any]

    def best(self, structure: str, sparsity: float) -> dict[str, Any] | None:
        """The cell with the highest accuracy there (ties: agreement, then KL, then order); None if there is none."""
        cells = [c for c in self.unrepaired if c["structure"] == structure and c["sparsity"] == sparsity]
        return max(cells, key=merit) if cells else None

    @property
    def unrepaired(self) -> list[dict[str, Any]]:
        """What criteria and allocations came to by themselves."""
        return [cell for cell in self.cells if not cell["repair"]]

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
                cell.setdefault("repair", "")  # a file that is older than this column holds criteria alone
                [cell[column] for column in COLUMNS]
                if cell["repair"] not in ("", REFINED):
                    raise ValueError(f"a cell's repair is {cell['repair']!r}")
            if all(cell["repair"] for cell in found["cells"]):
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
        return self._measured(self.plan(structure, criterion, allocation, sparsity), criterion, allocation, sparsity)

    def repaired(self, cell: Mapping[str, Any], repair: Callable[[Plan], Plan]) -> dict[str, Any]:
        """The cell of what ``repair`` makes of a cell's plan."""
        how = cell["criterion"], cell["allocation"], cell["sparsity"]
        return self._measured(repair(self.plan(cell["structure"], *how)), *how, repair=REFINED)

    def _measured(self, plan: Plan, criterion: str, allocation: str, sparsity: float, repair: str = "") -> dict[str, Any]:
        outputs, labels = predict(masked(self.model, plan), self.batches)
        reached = plan.sparsity()
        return {
            "structure": plan.structure,
            "criterion": criterion,
            "allocation": allocation,
            "sparsity": sparsity,
            "repair": repair,
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
    repair: Callable[[Plan], Plan] | None = None,
    repair_at: Sequence[float] | None = None,
) -> Comparison:
    """Measures every criterion × allocation × sparsity of every structure on ``batches`` (validation data).

    Args:
        model: the dense model that ``scores`` were made from.
        scores: by criterion name.
        repair: of every structure and sparsity the best cell's plan is also measured after this; see ``prunekit.refine``.
        repair_at: only at these sparsities (N:M always); None for all.
    """
    candidates = Candidates(model, scores, batches, structures, attention)
    grid = [(s, c, a, p) for s in structures for c in scores for a, p in choices(s, allocations, sparsities)]
    again = [
        (s, p)
        for s, p in dict.fromkeys((s, p) for s, _, _, p in grid)
        if repair is not None and (repair_at is None or p in repair_at or implied_sparsity(s) is not None)
    ]
    found = Comparison([], accuracy(candidates.dense, candidates.labels), dict(made_from or {}), {})
    with Bar("compare (cells)", len(grid) + len(again)) as bar:
        for structure, criterion, allocation, sparsity in grid:
            found.cells.append(candidates.cell(structure, criterion, allocation, sparsity))
            bar.advance()
        for structure, sparsity in again:
            best = found.best(structure, sparsity)
            assert best is not None
            assert repair is not None
            found.cells.append(candidates.repaired(best, repair))
            bar.advance()
    return found
