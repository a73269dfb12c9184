"""What docs/comparison.md tells of a study in areas: criteria, regret of choosing, like with like, what compensation gives.

    python benchmarks/comparison_tables.py DIR

DIR is what `prunekit compare STUDY --out DIR` wrote, of any study; `prunekit compare DIR --table markdown` has the figures at
each sparsity, one-shot and fine-tuned, with paired tests. Exits 1 when a goal for `auto` is missed: regret at most 1 point on
average and 3 in any case, and never behind magnitude, Taylor, Fisher or LAMP (unstructured) by more than one standard deviation
over the seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from refine_tables import points, table

from prunekit.report.measures import deciding
from prunekit.search.study import StudyRecord
from prunekit.search.summary import only_sparsity

MARGIN = "target=margin,aggregation=l2"
BOTH = f"tempered(survival({MARGIN})^0.5*taylor({MARGIN})^0.5)"
LABELS = {
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
"""Criteria of docs/comparison.md's columns; a study that has none of them has all of its own."""
LIKE = {
    "tempered: influence - taylor": (f"tempered(influence({MARGIN}))", f"tempered(taylor({MARGIN}))"),
    "tempered: survival - taylor": (f"tempered(survival({MARGIN}))", f"tempered(taylor({MARGIN}))"),
    "tempered: both - taylor": (BOTH, f"tempered(taylor({MARGIN}))"),
    "influence - taylor": (f"influence({MARGIN})", f"taylor({MARGIN})"),
    "survival - taylor": (f"survival({MARGIN})", f"taylor({MARGIN})"),
}
NEVER_BEHIND = ("magnitude", "taylor", "fisher", "lamp")
FAMILY = ("influence", "survival", "lca", "movement")


def of(found: dict[str, Any] | None) -> str:
    return "" if found is None else points(found["values"])


def name(entry: dict[str, Any]) -> str:
    one = only_sparsity(entry)
    return f"{entry['case']}, {entry['structure']}{'' if one is None else f' at {one:g}'}"


def short(criterion: str) -> str:
    """For tables: the margin target with L2 over samples is in most names."""
    return criterion.replace(f"({MARGIN})", "ₘ")


def of_path(method: str) -> bool:
    return any(word in method for word in FAMILY)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Mean of the paired differences over seeds, and its standard error."""
    values = [a - b for a, b in zip(ours["values"], theirs["values"], strict=True)]
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def signed(mean: float, error: float) -> str:
    return f"{mean:+.1f} ({error:.1f})"


def areas(summary: list[dict[str, Any]], told: str, sign: float) -> None:
    every = list(dict.fromkeys(m for e in summary for m in e["methods"]))
    shown = [m for m in LABELS if m in every] if set(every) > set(LABELS) else every
    rows = []
    for e in summary:
        best = max(e["methods"], key=lambda m: sign * e["methods"][m]["mean"])
        rows.append([name(e), f"**{of(e['auto'])}**", f"{short(best)}: {of(e['methods'][best])}",
                     *(of(e["methods"].get(m)) for m in shown)])  # fmt: skip
    print(told, "\n")
    table(["case", "auto", "best criterion", *(LABELS.get(m, short(m)) for m in shown)], rows)


def hindsight(summary: list[dict[str, Any]], sign: float) -> list[str]:
    """auto against what nobody could have known; returns the goals that it missed."""
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
                lead = sign * difference(e["auto"], e["methods"][m])[0]
                if lead < -(e["methods"][m]["std"] or 0):
                    behind.append(f"{m} by {-lead:.1f}")
        missed += [f"{name(e)}: behind {b}" for b in behind]
        error = "" if regret["se"] is None else f" ± {regret['se']:.2f}"
        rows.append([name(e), f"{short(variant[0])}, {variant[1]}", of(e["auto"]["hindsight"]), of(e["auto"]),
                     f"{regret['mean']:.2f}{error}", ", ".join(behind) or "none"])  # fmt: skip
    table(["case", "best in hindsight", "its area", "auto", "regret (standard error)", "auto behind a baseline"], rows)
    for structure, values in regrets.items():
        print(f"mean regret, {structure}: {statistics.fmean(values):.2f}")
        if statistics.fmean(values) > 1:
            missed.append(f"mean regret of {structure}: {statistics.fmean(values):.2f}")
    return missed


def like_with_like(summary: list[dict[str, Any]], sign: float) -> None:
    pairs = {label: pair for label, pair in LIKE.items() if all(m in e["methods"] for e in summary for m in pair)}
    both = all(any(map(of_path, e["methods"])) and not all(map(of_path, e["methods"])) for e in summary)
    if not pairs and not both:
        return
    print("\nLike with like: paired differences over seeds (standard error)\n")
    rows = []
    for e in summary:
        row = [name(e), *(signed(*difference(e["methods"][a], e["methods"][b])) for a, b in pairs.values())]
        if both:
            best, without = (
                max((m for m in e["methods"] if of_path(m) == path), key=lambda m: sign * e["methods"][m]["mean"])
                for path in (True, False)
            )
            lead = signed(*difference(e["methods"][best], e["methods"][without]))
            row.append(f"{short(best)} - {short(without)}: {lead}")
        rows.append(row)
    table(["case", *pairs, *(["best with the path - best without"] if both else [])], rows)


def repaired(summary: list[dict[str, Any]], seeds: int, first: list[str]) -> None:
    """Of the criteria that every run looked at, ``first`` first: means over other seeds cannot be compared."""
    for repair in dict.fromkeys(r for e in summary for r in e["repaired"]):
        having = {name(e): e["repaired"][repair] for e in summary if repair in e["repaired"]}
        every = dict.fromkeys([*first, *(method for here in having.values() for method in here)])
        always = [m for m in every if all(len(here.get(m, {"values": []})["values"]) == seeds for here in having.values())]
        print(f"{repair}: area before and after, of the criteria that every run looked at\n")
        rows = [[case, *(f"{of(here[m]['unrepaired'])} → {of(here[m])}" for m in always)] for case, here in having.items()]
        table(["case", *map(short, always)], rows)


def main() -> int:
    found = StudyRecord.load(Path(sys.argv[1]) / "compare.json")
    summary, measure = found.summary, deciding(found.measures)
    one = all(only_sparsity(e) is not None for e in summary)
    told = f"{'Test' if one else 'Area under the curve of test'} {measure.title}{', points' if measure.unit == '%' else ''}"
    seeds = found.study["seeds"]
    over = f"mean ± standard deviation over the seeds {seeds}" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    areas(summary, f"{told}, {over}", measure.sign)
    missed = hindsight(summary, measure.sign)
    like_with_like(summary, measure.sign)
    repaired(summary, len(seeds), found.study["always"])
    print("goals missed:", "; ".join(missed) or "none")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
