"""The cells of a comparison that can be trusted, for one trained model: one-shot plans with their control, and fine-tuned ones.

Cells are measured on validation data, which choices may look at, and on test data, which none may; scores were made from a
third set. See ``prunekit.search.summary`` for what a row holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from torch import nn

from prunekit.apply import apply_plan, masked
from prunekit.artifact import Artifact, conform
from prunekit.data import Samples
from prunekit.measure import sizes
from prunekit.plan import GROUPED, Plan, choices
from prunekit.search.compare import Candidates
from prunekit.search.ways import RepairSamples, get_repair, refine_plan
from prunekit.steps.again import refine_again
from prunekit.steps.finetune import Finetuning, Tuner, finetune
from prunekit.task.evaluation import MeasureTold, References, evaluate
from prunekit.trajectory.copies import copied

REFINED_AGAIN = "refined again"
DENSE = "dense"
Compensate = Callable[[nn.Module, Plan], nn.Module]
"""``(model, plan)`` -> a copy whose kept weights make up for the removed ones."""


class CellRow(TypedDict):
    """A row of a study, see ``prunekit.search.summary``."""

    structure: str
    criterion: str
    allocation: str
    sparsity: float
    control: str
    epochs: int
    repair: str
    achieved: float
    achieved_all: float
    kept: dict[str, int]
    validation: dict[str, float]
    test: dict[str, float]
    method: NotRequired[str]
    seconds: NotRequired[float]
    again: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class Cells(Artifact):
    """A file of a study's cells: rows (see ``prunekit.search.summary``), and what they were measured from."""

    KIND: ClassVar[str] = "cells"
    CALLED: ClassVar[str] = "cells"

    made_from: dict[str, Any]
    rows: list[dict[str, Any]]

    def check(self) -> None:
        """Every row has its facts, and figures of the same measures."""
        conform(self.rows, list[CellRow], "rows")
        for number, row in enumerate(self.rows):
            for split in ("validation", "test"):
                if row[split].keys() != self.rows[0][split].keys():
                    raise ValueError(f"rows[{number}].{split} has other measures than the first row")


@dataclass(frozen=True, kw_only=True)
class StudyRecord(Artifact):
    """A study's compare.json: what was asked, what was run on what, and what it came to.

    Attributes:
        study: the resolved study.
        runs: facts about each case and seed: the dense model, samples, and what its criteria cost; ``dense_tuned`` where
            plans were fine-tuned: the dense model's figures after as many ``epochs`` more.
        measures: of the cases' task.
        summary: see ``prunekit.search.summary.summarise``.
        rows: how many pruned models were measured.
    """

    KIND: ClassVar[str] = "study"
    CALLED: ClassVar[str] = "study"

    study: dict[str, Any]
    machine: str
    runs: list[dict[str, Any]]
    measures: list[MeasureTold]
    summary: list[dict[str, Any]]
    rows: int
    cost: dict[str, Any]


@dataclass
class StudyRun:
    """What cells of one trained model are measured with.

    Attributes:
        candidates: model, scores and validation data.
        test: test data.
        seed: of what is shuffled.
    """

    candidates: Candidates
    test: Samples
    seed: int

    def measured(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """``validation`` and ``test``: the task's figures, closeness to the dense model among them."""
        on_test = evaluate(model, self.test, self.candidates.task, self._on_test)
        return {"validation": self.candidates.measured(model), "test": on_test.figures()}

    @cached_property
    def _on_test(self) -> References:
        return References.of_many(self.candidates.model, self.test, self.candidates.task)


def one_shot(
    bench: StudyRun, structure: str, criterion: str, allocations: Sequence[str], sparsities: Sequence[float], control: bool = True
) -> list[dict[str, Any]]:
    """One row an allocation and sparsity, no weight updated.

    Args:
        control: also the rows of plans that keep as many of every layer, but shuffled.
    """
    rows = []
    for allocation, sparsity in choices(structure, allocations, sparsities):
        plan = bench.candidates.plan(structure, criterion, allocation, sparsity)
        rows.append(_row(bench, plan, criterion, allocation, sparsity, ""))
        if control and (structure == "unstructured" or structure in GROUPED):
            rows.append(_row(bench, shuffled(plan, bench.seed), criterion, allocation, sparsity, "shuffled"))
    return rows


def fine_tuned(
    bench: StudyRun, structure: str, method: str, criterion: str, allocation: str, sparsity: float, how: Finetuning
) -> list[dict[str, Any]]:
    """One row: a plan after training on with its masks held; every method gets the same steps, rate and order of samples."""
    plan = bench.candidates.plan(structure, criterion, allocation, sparsity)
    model = _tuned(bench, plan, how)
    return [{**_row(bench, plan, criterion, allocation, sparsity, "", model), "method": method, "epochs": how.epochs}]


def _tuned(bench: StudyRun, plan: Plan, how: Finetuning) -> nn.Module:
    model = copied(bench.candidates.model)
    torch.manual_seed(how.seed)  # dropout
    finetune(model, plan, how)
    return model


def dense_tuned(bench: StudyRun, how: Finetuning) -> list[dict[str, Any]]:
    """One row: the dense model after the training that every fine-tuned row gets, nothing of it removed."""
    model = copied(bench.candidates.model)
    torch.manual_seed(how.seed)  # dropout
    with Tuner(model, {}, how, None, {}) as tuner:
        tuner.run()
    facts = {"structure": DENSE, "criterion": "", "allocation": "", "sparsity": 0.0, "control": DENSE, "epochs": how.epochs}
    return [{**facts, "repair": "", "achieved": 0.0, "achieved_all": 0.0, "kept": {}, **bench.measured(model)}]


def compensated(
    bench: StudyRun,
    structure: str,
    method: str,
    criterion: str,
    allocation: str,
    sparsities: Sequence[float],
    how: Compensate,
) -> list[dict[str, Any]]:
    """One row a sparsity: the kept weights make up for the removed ones."""
    rows = []
    for sparsity in sparsities:
        plan = bench.candidates.plan(structure, criterion, allocation, sparsity)
        row = _row(bench, plan, criterion, allocation, sparsity, "", _compensated(bench, plan, how))
        rows.append({**row, "method": method, "repair": "compensated"})
    return rows


@dataclass
class Repaired:
    """A plan repaired by ``way`` (``prunekit.search.ways``), made when its first row is measured, and once."""

    bench: StudyRun
    structure: str
    method: str
    criterion: str
    allocation: str
    sparsity: float
    way: str
    material: RepairSamples

    def rows(self, how: Finetuning | None = None) -> list[dict[str, Any]]:
        """One row, with the ``seconds`` that the repair took; with ``how`` one more, after fine-tuning."""
        rows = [self._row(self.way)]
        if how is not None:
            rows.append({**self._row(self.way, _tuned(self.bench, self._made[0], how)), "epochs": how.epochs})
        return rows

    def compensated(self, how: Compensate) -> list[dict[str, Any]]:
        """One row: the repaired plan with its weights compensated too."""
        return [self._row(f"{self.way}+compensated", _compensated(self.bench, self._made[0], how))]

    @cached_property
    def _made(self) -> tuple[Plan, nn.Module | None, float]:
        plan = self.bench.candidates.plan(self.structure, self.criterion, self.allocation, self.sparsity)
        started = time.perf_counter()
        found = get_repair(self.way, self.structure)(plan, self.bench.candidates.model, self.material)
        better, model = found if isinstance(found, tuple) else (found, None)
        return better, model, round(time.perf_counter() - started, 2)

    def _row(self, repair: str, model: nn.Module | None = None) -> dict[str, Any]:
        plan, made, seconds = self._made
        row = _row(self.bench, plan, self.criterion, self.allocation, self.sparsity, "", made if model is None else model)
        return {**row, "method": self.method, "seconds": seconds, "repair": repair}


def refined_again(
    bench: StudyRun,
    structure: str,
    method: str,
    criterion: str,
    allocation: str,
    sparsity: float,
    material: RepairSamples,
    how: Finetuning,
    again: int,
) -> list[dict[str, Any]]:
    """One row: refined, and ``again`` times again within the fine-tuning, whose epochs are split into runs.

    As many steps as every other fine-tuned row has, the rate's schedule anew in every run.
    """
    dense = bench.candidates.model
    started = time.perf_counter()
    plan = refine_plan(bench.candidates.plan(structure, criterion, allocation, sparsity), dense, material)
    seconds = time.perf_counter() - started

    def refined(plan: Plan, base: nn.Module, reference: nn.Module) -> Plan:
        nonlocal seconds
        started = time.perf_counter()
        found = refine_plan(plan, base, material, reference=reference)
        seconds += time.perf_counter() - started
        return found

    first, *later = split(how.epochs, again + 1)
    model = copied(dense)
    torch.manual_seed(how.seed)  # dropout
    with Tuner(model, plan.masks(), how, None, {}) as tuner:
        tuner.run(epochs=first)
        for number, epochs in enumerate(later, 1):
            plan = refine_again(tuner, plan, dense, refined)
            tuner.run(how.seed + number, epochs=epochs)
    row = _row(bench, plan, criterion, allocation, sparsity, "", model)
    facts = {"method": method, "seconds": round(seconds, 2), "epochs": how.epochs, "again": again}
    return [{**row, **facts, "repair": REFINED_AGAIN}]


def split(epochs: int, runs: int) -> list[int]:
    """As even as whole numbers are; the later the longer."""
    return [epochs * (number + 1) // runs - epochs * number // runs for number in range(runs)]


def _compensated(bench: StudyRun, plan: Plan, how: Compensate) -> nn.Module:
    model = how(bench.candidates.model, plan)
    apply_plan(model, plan)
    return model


def shuffled(plan: Plan, seed: int) -> Plan:
    """A plan that keeps as many of every layer, by chance: what is left when only the layer ratios count."""
    generator = torch.Generator().manual_seed(seed)
    return plan.edited(
        {
            name: keep.flatten()[torch.randperm(keep.numel(), generator=generator)].view(keep.shape)
            for name, keep in plan.keep.items()
        }
    )


def _row(
    bench: StudyRun, plan: Plan, criterion: str, allocation: str, sparsity: float, control: str, model: nn.Module | None = None
) -> dict[str, Any]:
    reached = plan.sparsity()
    one = masked(bench.candidates.model, plan) if model is None else model
    return {
        "structure": plan.structure,
        "criterion": criterion,
        "allocation": allocation,
        "sparsity": sparsity,
        "control": control,
        "epochs": 0,
        "repair": "",
        "achieved": reached["prunable"],
        "achieved_all": reached["all"],
        "kept": {name: count["kept"] for name, count in plan.counts().items()},
        **bench.measured(one),
    }


def dense_facts(bench: StudyRun) -> dict[str, Any]:
    """The unpruned model: figures, parameters, theoretical MACs, and weights by layer."""
    model = bench.candidates.model
    return {**bench.measured(model), **sizes(model, bench.test.rows(0, 1)[0])}
