"""Tables of docs/refine.md from the result of `prunekit compare recipes/refine.yaml --out DIR`.

python benchmarks/refine_tables.py DIR
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

MARGIN = "(target=margin,aggregation=l2)"


def points(found: dict[str, Any]) -> str:
    return f"{found['mean']:.1f} ± {found['std']:.1f}"


def main() -> None:
    found = json.loads((Path(sys.argv[1]) / "compare.json").read_text(encoding="utf-8"))
    print("| case | dense | magnitude | best unrefined, in hindsight | compensated | **refined** | refined, compensated |")
    print("|---|---|---|---|---|---|---|")
    leads: dict[str, list[float]] = {}
    for e in sorted(found["summary"], key=lambda e: list(found["study"]["structures"]).index(e["structure"])):
        repaired, best = e["repaired"], e["auto"]["hindsight"]
        runs = [run for run in found["runs"] if run["case"] == e["case"]]
        dense = statistics.fmean(100 * run["dense"]["test"]["accuracy"] for run in runs)
        named = ", ".join(best["variant"]).replace(MARGIN, "ₘ")
        repairs = [points(repaired[r]["magnitude"]) for r in ("compensated", "refined", "refined+compensated")]
        print(f"| {e['case']}, {e['structure']} | {dense:.1f} | {points(e['methods']['magnitude'])} | {named}: {points(best)} | "
              f"{repairs[0]} | **{repairs[1]}** | {repairs[2]} |")  # fmt: skip
        leads.setdefault(e["structure"], []).append(repaired["refined"]["magnitude"]["mean"] - best["mean"])
    print()
    for structure, values in leads.items():
        listed = ", ".join(f"{value:+.1f}" for value in values)
        print(f"refined, ahead of the best unrefined in hindsight, {structure}: {listed}; mean {statistics.fmean(values):+.1f}")
    by_mean(Path(sys.argv[1]))


def by_mean(folder: Path) -> None:
    """The same by mean accuracy over the sparsities, unstructured: variants with every sparsity, best in hindsight."""
    with (folder / "compare.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["structure"] == "unstructured"]
    leads, levels = [], []
    for case in dict.fromkeys(row["case"] for row in rows):
        means: dict[tuple[str, str, str], list[float]] = {}
        for row in rows:
            if row["case"] == case:
                key = row["repair"], row["criterion"], row["allocation"]
                means.setdefault(key, []).append(100 * float(row["test_accuracy"]))
        best = max(statistics.fmean(values) for (repair, _, _), values in means.items() if not repair)
        refined = statistics.fmean(value for (repair, _, _), values in means.items() if repair == "refined" for value in values)
        leads.append(refined - best)
        levels.append((refined, best))
    listed = ", ".join(f"{lead:+.1f}" for lead in leads)
    ours, theirs = (statistics.fmean(level[i] for level in levels) for i in (0, 1))
    print(f"by mean accuracy, unstructured: refined {ours:.1f}, best unrefined {theirs:.1f}; ahead by {listed}; "
          f"mean {statistics.fmean(leads):+.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
