"""What score, compare and sensitivity print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.remote import Place
from prunekit.report.measures import deciding
from prunekit.report.tables import accuracy_tables
from prunekit.report.terminal.tables import again, in_unit, new_table, print_table
from prunekit.search.compare import Comparison
from prunekit.search.sensitivity import Sensitivity
from prunekit.search.study import StudyRecord
from prunekit.search.summary import only_sparsity


def show_scores(results: list[dict[str, Any]]) -> None:
    for r in results:
        error = r["findings"].get("error")
        note = f", estimated relative error {error['relative']:.2g}" if error else ""
        took = f" in {r['seconds']:.2f} s" if "seconds" in r else ""  # scores that were made in Python need not say it
        print(f"score: {r['criterion']}{took}{note} -> {r['path']}{again(r['reused'])}")
        if uncovered := r["findings"].get("uncovered"):
            listed = ", ".join(f"{name} {count:,}" for name, count in uncovered.items())
            print(f"  no scoring sample touches these weights, so they rank last for want of evidence: {listed}")
        if skipped := r["findings"].get("by_magnitude"):
            listed = ", ".join(f"{name} ({why})" for name, why in skipped["parameters"].items())
            scale = f", times {skipped['scale']:.3g}"
            print(f"  scored by magnitude{scale}, since {r['criterion']} has nothing to look at there: {listed}")


def show_comparison(result: tuple[Comparison, bool]) -> None:
    comparison, reused = result
    measure = deciding(comparison.measures)
    dense = f"dense {measure.number(comparison.dense[measure.name])}; " if measure.name in comparison.dense else ""
    for found in accuracy_tables(comparison):
        table = new_table(
            f"compare, {found['structure']}: validation {in_unit(measure)} ({dense}"
            "* best criterion at that sparsity)",
            "criterion", "allocation", *(f"{s:g}" for s in found["sparsities"]),
        )  # fmt: skip
        for (criterion, allocation), cells in found["rows"].items():
            marks = [f"{measure.number(c[measure.name])}{'*' if c['best'] else ' '}" if c else "" for c in cells]
            table.add_row(criterion, allocation, *marks)
        print_table(table)
    if reused:
        print("compare: unchanged, reused")


def show_study(result: tuple[StudyRecord, Place]) -> None:
    found, page = result
    measure = deciding(found.measures)
    points = ", in points" if measure.unit == "%" else ""
    digits = ".2f" if points else ".4g"
    seeds = found.study["seeds"]
    over = "mean ± standard deviation over seeds" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    table = new_table(f"compare: {_figure_told(found.summary, measure.title)}{points}, {over}",
                   "case, structure", "auto", "regret", "best criterion", "", "magnitude")  # fmt: skip
    for e in found.summary:
        best = max(e["methods"], key=lambda m: measure.sign * e["methods"][m]["mean"])
        magnitude = e["methods"].get("magnitude")
        table.add_row(
            f"{e['case']}, {e['structure']}{_at(e)}", _points(e["auto"], digits), _points(e["auto"]["regret"], digits), best,
            _points(e["methods"][best], digits), _points(magnitude, digits) if magnitude else "",
        )  # fmt: skip
    print_table(table)
    if len(seeds) < 3:
        print("  fewer than three seeds: no claim about criteria can rest on this")
    print(f"compare: {found.rows:,} pruned models -> {page}")


def _figure_told(summary: list[dict[str, Any]], measure: str) -> str:
    """What the table's figures are: a single sparsity is not an area."""
    single = [only_sparsity(entry) is not None for entry in summary]
    if all(single):
        return f"test {measure}"
    return f"area under the curve of test {measure}{' (at one sparsity, the figure there)' if any(single) else ''}"


def _at(entry: dict[str, Any]) -> str:
    one = only_sparsity(entry)
    return "" if one is None else f" at {one:g}"


def _points(found: dict[str, Any], digits: str) -> str:
    return f"{found['mean']:{digits}}" + ("" if found["std"] is None else f" ± {found['std']:{digits}}")


def show_sensitivity(result: tuple[Sensitivity, Path, bool]) -> None:
    found, path, reused = result
    made, measure = found.made_from, deciding(found.measures)
    dense = f" (dense {measure.number(found.dense[measure.name])})" if measure.name in found.dense else ""
    shares = [f"{s:g}" for s in made["sparsities"]]
    title = f"sensitivity, {made['structure']} by {made['criterion']}: validation {in_unit(measure)}{dense}"
    table = new_table(f"{title}{again(reused)}", "layer, alone", *shares)
    rows: dict[str, list[str]] = {}
    for cell in found.cells:
        rows.setdefault(cell["layer"], []).append(measure.number(cell[measure.name]))
    for layer, values in rows.items():
        table.add_row(layer, *values)
    print_table(table)
    print(f"sensitivity: {path}")
