"""A comparison's cells: repaired ones beside the criteria's, and never taken for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from prunekit import Plan, checkpoint
from prunekit.errors import ArtifactError
from prunekit.measure import merit
from prunekit.repair import refine
from prunekit.report import accuracy_tables, comparison_figure
from prunekit.search import Candidates, Comparison, choose, compare
from prunekit.search.compare import FACTS
from prunekit.task import Classification
from tests.repair.test_refine import Batches, trained
from tests.structure_models import random_scores

ALLOCATIONS, SPARSITIES = ["global", "uniform"], [0.3, 0.6, 0.8]


def compared(structures: Sequence[str], **options: Any) -> tuple[nn.Module, dict[str, Any], Batches, Comparison]:
    model, batches = trained("residual")
    scores = {f"random {seed}": random_scores(model, seed) for seed in range(2)}
    found = compare(
        model, scores, batches, structures=structures, allocations=ALLOCATIONS, sparsities=SPARSITIES, **options
    )  # fmt: skip
    return model, scores, batches, found


@pytest.mark.slow
def test_the_best_plan_everywhere_is_repaired() -> None:
    started: list[Plan] = []

    def repair(plan: Plan) -> Plan:
        started.append(plan)
        return refine(plan, model, batches, rounds=4, learn=False)

    model, batches = trained("residual")
    _, scores, _, plain = compared(["unstructured", "channels", "2:4"])
    found = compared(["unstructured", "channels", "2:4"], repair=repair, repair_at=[0.6, 0.8])[-1]
    assert [c for c in found.cells if not c["repair"]] == plain.cells
    repaired = [c for c in found.cells if c["repair"]]
    asked = [("unstructured", 0.6), ("unstructured", 0.8), ("channels", 0.6), ("channels", 0.8), ("2:4", 0.5)]
    assert [(c["structure"], c["sparsity"]) for c in repaired] == asked
    candidates = Candidates(model, scores, batches, ["channels"])
    for cell, plan in zip(repaired, started, strict=True):
        assert cell["repair"] == "refined"
        here = [c for c in plain.cells if (c["structure"], c["sparsity"]) == (cell["structure"], cell["sparsity"])]
        best = max(here, key=lambda cell: merit(Classification().choosing, cell))
        same = ("criterion", "allocation", "achieved", "achieved_all")
        assert [cell[k] for k in same] == [best[k] for k in same]
        assert plan.digest == candidates.plan(*(best[k] for k in ("structure", "criterion", "allocation", "sparsity"))).digest
        assert found.best(cell["structure"], cell["sparsity"], Classification()) == best
    assert all(len(c) == len(FACTS) + 3 for c in found.cells)


def test_auto_never_takes_a_repaired_cell() -> None:
    model, scores, batches, plain = compared(["unstructured"])
    better = {**plain.cells[0], "accuracy": 1.0, "agreement": 1.0, "kl": 0.0, "repair": "refined"}
    mixed = Comparison(made_from={}, dense=plain.dense, cells=[better, *plain.cells], cost={})
    candidates = Candidates(model, scores, batches, ["unstructured"])
    for sparsity in SPARSITIES:
        chosen = partial(choose, structure="unstructured", sparsity=sparsity, allocations=ALLOCATIONS)
        assert chosen(candidates, mixed) == chosen(candidates, plain) == mixed.best("unstructured", sparsity, Classification())
    assert mixed.best("unstructured", 0.3, Classification())["repair"] == ""  # type: ignore[index]


def test_files_without_the_column_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    *_, plain = compared(["unstructured"])
    path = tmp_path / "compare.json"
    plain.save(path)
    assert Comparison.load(path).cells == plain.cells
    content = checkpoint.read_json(path)
    for cell in content["cells"]:
        del cell["repair"]
    checkpoint.write_json(path, content)
    assert Comparison.load(path).cells == plain.cells
    first = plain.cells[0]
    unmeasured = {name: value for name, value in first.items() if name != "agreement"}
    for cells in ([{**c, "repair": "refined"} for c in plain.cells], [{**first, "repair": 3}], [unmeasured]):
        damage = {"cells": cells}
        checkpoint.write_json(path, {**content, **damage})
        with pytest.raises(ArtifactError, match="not a whole comparison"):
            Comparison.load(path)


def test_tables_and_picture_have_a_line_of_repaired_plans() -> None:
    *_, plain = compared(["unstructured"])
    cells = [{**c, "repair": "refined", "accuracy": 1.0} for c in plain.cells if c["criterion"] == "random 0"][1:3]
    mixed = Comparison(made_from={}, dense=plain.dense, cells=[*plain.cells, *cells], cost={})
    (before,), (after,) = accuracy_tables(plain), accuracy_tables(mixed)
    added = after["rows"].keys() - before["rows"].keys()
    assert added == {("refined", "of the best")}
    assert {k: v for k, v in after["rows"].items() if k not in added} == before["rows"]
    line = after["rows"]["refined", "of the best"]
    assert [c and c["accuracy"] for c in line] == [None, 1.0, 1.0]
    assert not any(c["best"] for c in line if c)
    for comparison, lines in ((plain, 3), (mixed, 4)):  # two criteria and the dense model
        assert [len(panel.lines) for panel in comparison_figure(comparison).axes] == [lines, lines]
