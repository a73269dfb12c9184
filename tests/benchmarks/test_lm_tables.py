"""Tables of language-model studies: what is chosen is chosen on validation data, and ratios are each seed's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks import lm_tables


def row(criterion: str, allocation: str, repair: str, seed: int, validation: float, test: float) -> dict[str, Any]:
    return {
        "case": "llama", "seed": seed, "structure": "heads+neurons", "criterion": criterion, "allocation": allocation,
        "sparsity": 0.5, "repair": repair, "validation_kl": validation, "test_kl": test, "test_perplexity": 30 + test,
    }  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with (folder / "compare.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_validation_data_choose_a_criterions_allocation(tmp_path: Path) -> None:
    rows = [row("flap", "global", "", 0, 0.2, 0.3), row("flap", "standardised", "", 0, 0.25, 0.1)]

    told = lm_tables.figures(written(tmp_path, rows))

    assert told["llama"]["flap"]["heads+neurons", 0.5] == [(0.3, 30.3)]


def test_ratios_are_of_each_seed_to_its_best_rival(tmp_path: Path) -> None:
    rows = [
        row("flap", "global", "", 0, 0.2, 0.2), row("flap", "global", "", 1, 0.4, 0.4),
        row("taylor", "global", "", 0, 0.4, 0.4), row("taylor", "global", "", 1, 0.1, 0.1),
        row("kfac", "global", "refit", 0, 0.1, 0.1), row("kfac", "global", "refit", 1, 0.2, 0.2),
    ]  # fmt: skip

    told = lm_tables.ratios(lm_tables.figures(written(tmp_path, rows))["llama"])

    assert "- kfac's units, refitted / best criterion: heads+neurons 0.5: 0.50, 2.00" in told
