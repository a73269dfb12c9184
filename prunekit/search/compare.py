"""Every criterion against every other, in each allocation and sparsity, and the best repaired: one-shot, on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypedDict

from torch import nn

from prunekit import checkpoint
from prunekit.apply import masked
from prunekit.artifact import Artifact, conform
from prunekit.criteria import Scores
from prunekit.data import Samples
from prunekit.errors import UsageError
from prunekit.measure import choosing, merit
from prunekit.measure.measure import told
from prunekit.plan import GROUPED, Plan, choices, plan_from
from prunekit.progress import Bar
from prunekit.structure import Group, find_groups, implied_sparsity
from prunekit.structure.structure import Mappings
from prunekit.task import Task, get_task
from prunekit.task.evaluation import CLASSIFICATION, MeasureTold, References, evaluate, measures_told

REFINED = "refined"


class CellFacts(TypedDict):
    """What a cell is; the figures of the task's measures follow."""

    structure: str
    criterion: str
    allocation: str
    sparsity: float
    repair: Literal["", "refined"]
    achieved: float
    achieved_all: float


FACTS = tuple(CellFacts.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Comparison(Artifact):
    """One row a cell (``FACTS`` and figures), the dense model's figures on validation data, and what it was made from.

    A cell's ``repair`` is empty, or ``refined``: what ``refine`` made of the best plan there, which has that criterion and
    allocation. Choices are made among the others.
    """

    KIND: ClassVar[str] = "comparison"
    CALLED: ClassVar[str] = "comparison"

    made_from: dict[str, Any]
    dense: dict[str, float]
    measures: list[MeasureTold] = field(default_factory=lambda: list(CLASSIFICATION))
    cells: list[dict[str, Any]]
    cost: dict[str, Any]

    def best(self, structure: str, sparsity: float, task: Task) -> dict[str, Any] | None:
        """The cell that does best there by ``Task.choosing`` (ties: order); None if there is none."""
        cells = [c for c in self.unrepaired if c["structure"] == structure and c["sparsity"] == sparsity]
        return max(cells, key=lambda cell: merit(task.choosing, cell)) if cells else None

    @property
    def columns(self) -> tuple[str, ...]:
        """``FACTS`` and the names of the figures."""
        return (*FACTS, *(key for key in self.cells[0] if key not in FACTS)) if self.cells else FACTS

    @property
    def unrepaired(self) -> list[dict[str, Any]]:
        """What criteria and allocations came to by themselves."""
        return [cell for cell in self.cells if not cell["repair"]]

    def csv(self) -> str:
        """The cells as comma-separated values, one row each."""
        return checkpoint.csv_text(self.columns, self.cells)

    @classmethod
    def brought_up_to_date(cls, content: dict[str, Any]) -> dict[str, Any]:
        """A file that is older than the column ``repair`` holds criteria alone; one without ``measures`` those of classes."""
        conform(content["cells"], list[dict[str, Any]], "cells")
        cells = [{"repair": "", **cell} for cell in content["cells"]]
        known = [measure for measure in CLASSIFICATION if all(measure["name"] in cell for cell in cells)]
        return {"measures": known, **content, "cells": cells}

    def check(self) -> None:
        """Every cell has its facts and figures, and there are some to choose among."""
        conform(self.made_from.get("scores", {}), dict[str, str], "made_from.scores")
        for number, cell in enumerate(self.cells):
            conform(cell, CellFacts, f"cells[{number}]")
            for name in self.columns:
                if name not in FACTS:
                    conform(cell[name], float, f"cells[{number}].{name}")
        if not self.unrepaired:
            raise ValueError("no cells")
        if not self.dense or len(self.columns) == len(FACTS):
            raise ValueError("cells without figures")
        if lacking := [measure.name for measure in choosing(told(self.measures)) if measure.name not in self.columns]:
            raise ValueError(f"cells without {', '.join(lacking)}")

    def fits(self, task: Task) -> bool:
        """Whether it holds the figures that ``task`` chooses by."""
        return {measure.name for measure in (*task.measures, *task.closeness)} <= set(self.columns)


class Candidates:
    """Plans for one model and their measured cells; the model is traced and run densely once."""

    def __init__(
        self,
        model: nn.Module,
        scores: Mapping[str, Scores],
        batches: Any,
        structures: Sequence[str],
        attention: Mappings = (),
        task: str | Task | None = None,
    ) -> None:
        self.model, self.scores, self.task = model, scores, get_task(task)
        self.samples = Samples.of(batches, self.task.batch)
        example = self.samples.rows(0, min(2, len(self.samples)))[0]
        self.groups: dict[str, Sequence[Group]] = {
            name: find_groups(name, model, example, attention) for name in structures if name in GROUPED
        }
        self.references = References.of_many(model, self.samples, self.task)

    @cached_property
    def dense(self) -> dict[str, float]:
        """The dense model's own figures."""
        return evaluate(self.model, self.samples, self.task).figures() if self.task.measures else self.measured(self.model)

    def measured(self, model: nn.Module) -> dict[str, float]:
        """A model's figures, closeness to the dense one among them."""
        return evaluate(model, self.samples, self.task, self.references).figures()

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
        reached = plan.sparsity()
        return {
            "structure": plan.structure,
            "criterion": criterion,
            "allocation": allocation,
            "sparsity": sparsity,
            "repair": repair,
            "achieved": reached["prunable"],
            "achieved_all": reached["all"],
            **self.measured(masked(self.model, plan)),
        }


def compare(
    model: nn.Module,
    scores: Mapping[str, Scores],
    batches: Any,
    *,
    structures: Sequence[str] = ("unstructured",),
    allocations: Sequence[str] = ("global", "uniform"),
    sparsities: Sequence[float] = (0.5, 0.7, 0.9),
    made_from: Mapping[str, Any] | None = None,
    attention: Mappings = (),
    repair: Callable[[Plan], Plan] | None = None,
    repair_at: Sequence[float] | None = None,
    task: str | Task | None = None,
) -> Comparison:
    """Measures every criterion × allocation × sparsity of every structure on ``batches`` (validation data).

    Args:
        model: the dense model that ``scores`` were made from.
        scores: by criterion name.
        repair: of every structure and sparsity the best cell's plan is also measured after this; see ``prunekit.refine``.
        task: what the model is for; its first measure decides.
        repair_at: only at these sparsities (N:M always); None for all.

    Scores of one structure (REAP's of experts) have no cells in others.

    Raises:
        UsageError: no scores are of any of the structures.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, compare, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> scores = {name: score(Trajectory.of(model), model, criterion=name) for name in ("magnitude", "random")}
        >>> found = compare(model, scores, [(x, model(x).argmax(1))], allocations=["global"], sparsities=[0.5])
        >>> [(cell["criterion"], "accuracy" in cell) for cell in found.cells]
        [('magnitude', True), ('random', True)]
    """
    candidates = Candidates(model, scores, batches, structures, attention, task)
    grid = [
        (s, c, a, p)
        for s in structures
        for c in scores
        if scores[c].unsuited(s) is None
        for a, p in choices(s, allocations, sparsities)
    ]
    if not grid:
        raise UsageError(f"compare: none of {', '.join(scores)} scores {', '.join(structures)}; score another criterion first")
    again = [
        (s, p)
        for s, p in dict.fromkeys((s, p) for s, _, _, p in grid)
        if repair is not None and (repair_at is None or p in repair_at or implied_sparsity(s) is not None)
    ]
    found = Comparison(
        made_from=dict(made_from or {}), dense=candidates.dense, measures=measures_told(candidates.task), cells=[], cost={}
    )
    with Bar("compare (cells)", len(grid) + len(again)) as bar:
        for structure, criterion, allocation, sparsity in grid:
            found.cells.append(candidates.cell(structure, criterion, allocation, sparsity))
            bar.advance()
        for structure, sparsity in again:
            best = found.best(structure, sparsity, candidates.task)
            assert best is not None
            assert repair is not None
            found.cells.append(candidates.repaired(best, repair))
            bar.advance()
    return found
