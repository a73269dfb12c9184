"""Tables of docs/refine.md from the result of `prunekit compare recipes/refine.yaml --out DIR`.

python benchmarks/refine_tables.py DIR
"""

from __future__ import annotations

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


if __name__ == "__main__":
    main()
