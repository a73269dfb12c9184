"""Refined plans against rivals in any study that refines: the tables of docs/refine.md, and the goals set for refining.

    python benchmarks/refine_tables.py DIR [PICTURE.png]

DIR is what `prunekit compare STUDY --out DIR` wrote; docs/refine.md's is recipes/refine.yaml. A figure is the mean of the task's
first measure over the sparsities, and its standard deviation over seeds; differences are paired by seed. What a study has no rows
of is left out. `prunekit compare DIR --table markdown` has the figures at each sparsity.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prunekit.report import save_figure
from prunekit.report.measures import Shown, shown
from prunekit.report.plots import STYLES
from prunekit.search.study import StudyRecord
from prunekit.search.study_rows import read_rows

MARGIN = "(target=margin,aggregation=l2)"
RIVALS = ("rescored", "edge-popup", "gumbel-gates", "layer-swaps", "dsnot", "integrated-gradients", "tempered")

Row = dict[str, Any]
Seeds = dict[int, float]
"""Seed -> mean over the sparsities."""


def means(rows: Iterable[Row], measure: Shown) -> Seeds:
    """On test data, over every sparsity of each seed; rows are of one variant."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(measure.scale * row["test"][measure.name])
    return {seed: statistics.fmean(values) for seed, values in sorted(found.items())}


def points(values: Iterable[float], form: str = ".1f") -> str:
    listed = list(values)
    if not listed:
        return ""
    spread = f" ± {statistics.stdev(listed):{form}}" if len(listed) > 1 else ""
    return f"{statistics.fmean(listed):{form}}{spread}"


def ahead(ours: Seeds, theirs: Seeds) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def behind(difference: Sequence[float]) -> bool:
    """By more than a standard deviation of the paired difference."""
    return statistics.fmean(difference) < -(statistics.stdev(difference) if len(difference) > 1 else 0)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


class Results:
    """Rows of compare.csv by what they are; ``first`` is the task's first measure, ``close`` the first of closeness to dense."""

    def __init__(self, folder: Path) -> None:
        self.record = StudyRecord.load(folder / "compare.json")
        measures = shown(self.record.measures)
        self.first, self.close = measures[0], next((m for m in measures[::-1] if m.close), measures[0])
        self.rows = [row for row in read_rows(folder / "compare.csv", self.record.measures) if not row["control"]]
        self.cases = list(dict.fromkeys(row["case"] for row in self.rows))
        self.structures = list(dict.fromkeys(row["structure"] for row in self.rows))

    def means(self, rows: Iterable[Row]) -> Seeds:
        return means(rows, self.first)

    def better(self, values: Iterable[float]) -> float:
        """What a larger one of is better."""
        return self.first.sign * statistics.fmean(values)

    def sparsities(self, structure: str) -> list[float]:
        return sorted({row["sparsity"] for row in self.rows if row["structure"] == structure})

    def repaired(self, case: str, structure: str, way: str, tuned: bool = False) -> list[Row]:
        """Repaired by ``way``, of the method that repairs were made of; fine-tuned or not."""
        return [
            row for row in self.rows
            if (row["case"], row["structure"], row["repair"]) == (case, structure, way) and bool(row["epochs"]) == tuned
        ]  # fmt: skip

    def method(self, case: str, structure: str, name: str, repair: str, tuned: bool = False) -> list[Row]:
        return [row for row in self.repaired(case, structure, repair, tuned) if row["method"] == name]

    def plain(self, case: str, structure: str) -> dict[str, list[Row]]:
        """Unrefined one-shot plans by variant: criterion, allocation."""
        found: dict[str, list[Row]] = {}
        for row in self.repaired(case, structure, ""):
            found.setdefault(f"{row['criterion'].replace(MARGIN, 'ₘ')}, {row['allocation']}", []).append(row)
        longest = max(len(rows) for rows in found.values())
        return {name: rows for name, rows in found.items() if len(rows) == longest}

    def best(self, case: str, structure: str) -> tuple[str, Seeds]:
        """The unrefined variant with the largest mean on test data: nobody could have known."""
        found = {name: self.means(rows) for name, rows in self.plain(case, structure).items()}
        name = max(found, key=lambda n: self.better(found[n].values()))
        return name, found[name]

    def refined(self, structure: str, tuned: bool = False) -> list[str]:
        """Cases with refined plans."""
        return [case for case in self.cases if self.repaired(case, structure, "refined", tuned)]


def one_shot(results: Results, structure: str, rivals: Sequence[str], missed: list[str], goal: float, least: float) -> None:
    """Refined against the best unrefined one and every rival."""
    cases, sign = results.refined(structure), results.first.sign
    if not cases:
        return
    rivals = [r for r in rivals if any(results.repaired(case, structure, r) for case in cases)]
    lines, leads = [], []
    for case in cases:
        ours = results.means(results.repaired(case, structure, "refined"))
        name, best = results.best(case, structure)
        others = {rival: results.means(results.repaired(case, structure, rival)) for rival in rivals}
        line = [case, f"{name}: {points(best.values())}", *(points(o.values()) for o in others.values())]
        lines.append([*line, f"**{points(ours.values())}**"])
        unrefined = [best, *(others[way] for way in ("rescored", "rescored-10") if others.get(way))]
        lead = min(([sign * d for d in ahead(ours, other)] for other in unrefined), key=statistics.fmean)
        leads.append(statistics.fmean(lead))
        if leads[-1] < least:
            missed.append(f"{structure}, {case}: {leads[-1]:+.1f} ahead of the best unrefined, not {least:g}")
        for rival, other in others.items():
            if other and behind([sign * d for d in ahead(ours, other)]):
                missed.append(f"{structure}, {case}: behind {rival} by {points(ahead(other, ours))}")
    print(f"{structure}, one-shot, {results.first.title}{' in %' if results.first.unit == '%' else ''}\n")
    table(["case", "best unrefined, in hindsight", *rivals, "**refined**"], lines)
    listed = ", ".join(f"{lead:+.1f}" for lead in leads)
    print(f"ahead of the best unrefined (rescored among them): {listed}; mean {statistics.fmean(leads):+.1f}\n")
    if statistics.fmean(leads) < goal:
        missed.append(f"{structure}: {statistics.fmean(leads):+.1f} on average ahead of the best unrefined, not {goal:g}")


def tuned(results: Results, missed: list[str]) -> None:
    """After fine-tuning: single weights, mean over the sparsities, and at the highest."""
    cases, sign = results.refined("unstructured", tuned=True), results.first.sign
    if not cases:
        return
    columns: dict[str, Callable[[str], list[Row]]] = {
        **{
            name: (lambda case, name=name: results.method(case, "unstructured", name, "", True))  # type: ignore[misc]
            for name in ("magnitude", "lamp")
        },
        **{
            way: (lambda case, way=way: results.repaired(case, "unstructured", way, True))  # type: ignore[misc]
            for way in ("rescored", "edge-popup", "refined", "refined again")
        },
    }
    columns = {name: found for name, found in columns.items() if all(map(found, cases))}
    lines, last = [], {name: [] for name in columns}  # type: ignore[var-annotated]
    for case in cases:
        rows = {name: found(case) for name, found in columns.items()}
        sparsest = max(row["sparsity"] for row in rows["refined"])
        whole = {name: results.means(found) for name, found in rows.items()}
        end = {name: results.means(row for row in found if row["sparsity"] == sparsest) for name, found in rows.items()}
        lines.append([case, *(f"{points(whole[n].values())} ({points(end[n].values())})" for n in columns)])
        for name in columns:
            last[name].append(statistics.fmean(end[name].values()))
        for name in columns.keys() & {"magnitude", "lamp"}:
            if sign * statistics.fmean(ahead(whole["refined"], whole[name])) <= 0:
                missed.append(f"fine-tuned, {case}: not ahead of {name}")
        if "rescored" in columns and behind([sign * d for d in ahead(whole["refined"], whole["rescored"])]):
            missed.append(f"fine-tuned, {case}: behind rescored by {points(ahead(whole['rescored'], whole['refined']))}")
    print(f"unstructured, fine-tuned: mean over sparsities (at the highest), {results.first.axis}\n")
    table(["case", *columns], lines)
    at_end = {name: statistics.fmean(values) for name, values in last.items()}
    print("at the highest sparsity, mean over cases: " + ", ".join(f"{n} {v:.1f}" for n, v in at_end.items()) + "\n")
    at_end.pop("refined again", None)  # ours as well
    if max(at_end, key=lambda n: sign * at_end[n]) != "refined":
        missed.append("fine-tuned: not ahead of all at the highest sparsity")


def two_of_four(results: Results, missed: list[str]) -> None:
    """How far 2:4 plans are from the dense model on test data."""
    cases = results.refined("2:4")
    plain = [name for name in ("magnitude", "wanda") if all(f"{name}, global" in results.plain(c, "2:4") for c in cases)]
    if not cases:
        return
    far = {name: [] for name in (*plain, "refined")}  # type: ignore[var-annotated]
    lines = []
    for case in cases:
        rows = {name: results.plain(case, "2:4")[f"{name}, global"] for name in plain}
        rows["refined"] = results.repaired(case, "2:4", "refined")
        found = {name: means(of, results.close) for name, of in rows.items()}
        for name, values in found.items():
            far[name].append(statistics.fmean(values.values()))
        lines.append(
            [case, *(points(v.values(), ".3f") for v in found.values()), points(results.means(rows["refined"]).values())]
        )
    print(f"2:4, {results.close.title} on test data\n")
    table(["case", *far, f"{results.first.axis} of refined"], lines)
    mean = {name: statistics.fmean(values) for name, values in far.items()}
    print("mean over cases: " + ", ".join(f"{name} {value:.3f}" for name, value in mean.items()) + "\n")
    for name in plain:
        if mean["refined"] > mean[name] / 2:
            missed.append(f"2:4: divergence {mean['refined'] / mean[name]:.2f} of {name}'s, not 0.5")


def picture(results: Results, path: Path) -> None:
    """Single weights, one-shot: the first measure on test data over sparsity, mean over seeds; a panel a case."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, -(-len(results.cases) // 2), sharex=True, sharey=True).flatten()
    for panel, case in zip(panels, results.cases, strict=False):
        name, _ = results.best(case, "unstructured")
        plain = results.plain(case, "unstructured")
        curves = {
            **({"magnitude, global": plain["magnitude, global"]} if "magnitude, global" in plain else {}),
            "best unrefined, in hindsight": plain[name],
            **{way: results.repaired(case, "unstructured", way) for way in ("rescored", "edge-popup", "refined")},
        }
        for number, (label, rows) in enumerate(curves.items()):
            x = sorted({row["sparsity"] for row in rows})
            y = [statistics.fmean(results.means(row for row in rows if row["sparsity"] == s).values()) for s in x]
            line, marker, colour = ("-", "*", "black") if label == "refined" else STYLES[number]
            panel.plot(
                [100 * s for s in x], y, linestyle=line, marker=marker, color=colour, label=label, markersize=5,
                linewidth=2.2 if label == "refined" else 1.3,
            )  # fmt: skip
        panel.set_title(case, fontsize=10)
        panel.grid(alpha=0.25)
    figure.supxlabel("weights removed (%)", fontsize=10)
    figure.supylabel(f"test {results.first.axis}", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    save_figure(figure, path)


def main() -> int:
    results, missed = Results(Path(sys.argv[1])), list[str]()
    if not any(results.refined(structure) for structure in results.structures):
        print(f"{sys.argv[1]}: no refined plans; this is for studies whose recipe has refine")
        return 2
    if len(sys.argv) > 2:
        picture(results, Path(sys.argv[2]))
    one_shot(results, "unstructured", RIVALS, missed, goal=15, least=4)
    tuned(results, missed)
    one_shot(results, "channels", ("rescored", "rescored-10"), missed, goal=5, least=0)
    two_of_four(results, missed)
    print("goals missed:", *(missed or ["none"]), sep="\n- ")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
