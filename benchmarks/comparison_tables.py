"""Tables of docs/comparison.md from the result of `prunekit compare recipes/comparison.yaml --out DIR`.

    python benchmarks/comparison_tables.py DIR

Exits 1 when a goal for `auto` is missed: regret at most 1 point on average and 3 in any case, and never behind magnitude, Taylor,
Fisher or LAMP (unstructured) by more than one standard deviation over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

MARGIN = "target=margin,aggregation=l2"
BOTH = f"tempered(survival({MARGIN})^0.5*taylor({MARGIN})^0.5)"
SHOWN = {
    "magnitude": "magnitude",
    "lamp": "lamp",
    "taylor": "taylor",
    f"taylor({MARGIN})": "taylor, margin",
    "fisher": "fisher",
    "wanda": "wanda",
    f"tempered(taylor({MARGIN}))": "tempered taylor",
    f"tempered(influence({MARGIN}))": "tempered influence",
    f"tempered(survival({MARGIN}))": "tempered survival",
    BOTH: "tempered survival × taylor",
}
LIKE = [
    (f"tempered(influence({MARGIN}))", f"tempered(taylor({MARGIN}))"),
    (f"tempered(survival({MARGIN}))", f"tempered(taylor({MARGIN}))"),
    (BOTH, f"tempered(taylor({MARGIN}))"),
    (f"influence({MARGIN})", f"taylor({MARGIN})"),
    (f"survival({MARGIN})", f"taylor({MARGIN})"),
]
NEVER_BEHIND = ("magnitude", "taylor", "fisher", "lamp")
FAMILY = ("influence", "survival", "lca", "movement")


def points(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.1f}" + ("" if found["std"] is None else f" ± {found['std']:.1f}")


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def name(entry: dict[str, Any]) -> str:
    return f"{entry['case']}, {entry['structure']}"


def short(criterion: str) -> str:
    """For tables: the margin target with L2 over samples is in most names."""
    return criterion.replace(f"({MARGIN})", "ₘ")


def of_path(method: str) -> bool:
    return any(word in method for word in FAMILY)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Mean of the paired differences over seeds, and its standard error."""
    values = [a - b for a, b in zip(ours["values"], theirs["values"], strict=True)]
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> int:
    found = json.loads((Path(sys.argv[1]) / "compare.json").read_text(encoding="utf-8"))
    summary = found["summary"]
    print(
        "Area under the curve of test accuracy, points, mean ± standard deviation over the seeds", found["study"]["seeds"], "\n"
    )
    shown = [m for m in SHOWN if any(m in e["methods"] for e in summary)]
    rows = []
    for e in summary:
        best = max((m for m in e["methods"]), key=lambda m: e["methods"][m]["mean"])
        rows.append([name(e), f"**{points(e['auto'])}**", f"{short(best)}: {points(e['methods'][best])}",
                     *(points(e["methods"].get(m)) for m in shown)])  # fmt: skip
    table(["case", "auto", "best criterion", *(SHOWN[m] for m in shown)], rows)

    print("auto against the best single criterion and allocation in hindsight\n")
    rows, missed = [], []
    regrets: dict[str, list[float]] = {}
    for e in summary:
        regret, variant = e["auto"]["regret"], e["auto"]["hindsight"]["variant"]
        regrets.setdefault(e["structure"], []).append(regret["mean"])
        if regret["mean"] > 3:
            missed.append(f"{name(e)}: regret {regret['mean']:.2f}")
        behind = []
        for m in NEVER_BEHIND:
            if m in e["methods"] and not (m == "lamp" and e["structure"] != "unstructured"):
                mean, _ = difference(e["auto"], e["methods"][m])
                if mean < -(e["methods"][m]["std"] or 0):
                    behind.append(f"{m} by {-mean:.1f}")
        missed += [f"{name(e)}: behind {b}" for b in behind]
        error = "" if regret["se"] is None else f" ± {regret['se']:.2f}"
        rows.append([name(e), f"{short(variant[0])}, {variant[1]}", points(e["auto"]["hindsight"]), points(e["auto"]),
                     f"{regret['mean']:.2f}{error}", ", ".join(behind) or "none"])  # fmt: skip
    table(["case", "best in hindsight", "its area", "auto", "regret (standard error)", "auto behind a baseline"], rows)
    for structure, values in regrets.items():
        print(f"mean regret, {structure}: {statistics.fmean(values):.2f}")
        if statistics.fmean(values) > 1:
            missed.append(f"mean regret of {structure}: {statistics.fmean(values):.2f}")

    print("\nLike with like: paired differences over seeds (standard error)\n")
    rows = []
    for e in summary:
        row = [name(e)]
        for a, b in LIKE:
            mean, error = difference(e["methods"][a], e["methods"][b])
            row.append(f"{mean:+.1f} ({error:.1f})")
        without = max((m for m in e["methods"] if not of_path(m)), key=lambda m: e["methods"][m]["mean"])
        best = max((m for m in e["methods"] if of_path(m)), key=lambda m: e["methods"][m]["mean"])
        mean, error = difference(e["methods"][best], e["methods"][without])
        rows.append([*row, f"{short(best)} - {short(without)}: {mean:+.1f} ({error:.1f})"])
    labels = [
        "tempered: influence - taylor",
        "tempered: survival - taylor",
        "tempered: both - taylor",
        "influence - taylor",
        "survival - taylor",
    ]
    table(["case", *labels, "best with the path - best without"], rows)

    always = list(found["study"]["always"])
    for repair in dict.fromkeys(r for e in summary for r in e["repaired"]):
        print(f"{repair}: area before and after, of the criteria that every run looked at\n")
        rows = []
        for e in summary:
            here = e["repaired"][repair]
            rows.append([name(e), *(f"{points(here[m]['unrepaired'])} → {points(here[m])}" if m in here else "" for m in always)])
        table(["case", *always], rows)
    if any(e["tuned"] for e in summary):
        print("After fine-tuning, all the same steps: test accuracy in %, of the criteria that every run looked at\n")
        rows = []
        for e in summary:
            cells = {(t["method"], t["sparsity"]): t["accuracy"] for t in e["tuned"] if not t["repair"]}
            for sparsity in sorted({t["sparsity"] for t in e["tuned"]}):
                rows.append([f"{name(e)}, {sparsity:g}", *(points(cells.get((m, sparsity))) for m in always)])
        table([f"case, sparsity ({found['study']['tune']['epochs']} epochs)", *always], rows)
    print("goals missed:", "; ".join(missed) or "none")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
