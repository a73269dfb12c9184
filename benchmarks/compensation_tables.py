"""Compensated weights in any study that compensates, such as recipes/compensation.yaml: the table of docs/criteria.md.

    python benchmarks/compensation_tables.py DIR

DIR is what `prunekit compare STUDY --out DIR` wrote. The task's first measure and the distance to the dense model on test data:
the mean over the sparsities, and the standard deviation over seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from refine_tables import Results, Row, means, points, table

COLUMNS = {"": "{}", "compensated": "{}, compensated", "refined": "refined", "refined+compensated": "refined, compensated"}
"""Repair -> head of its column, which names the criterion."""


def rows_of(results: Results, case: str, structure: str, criterion: str, repair: str) -> list[Row]:
    """Without a repair in the allocation whose weights are compensated."""
    if repair == "compensated":
        return results.method(case, structure, criterion, repair)
    rows = results.repaired(case, structure, repair)
    if repair:
        return rows
    one = {(row["seed"], row["allocation"]) for row in results.method(case, structure, criterion, "compensated")}
    return [row for row in rows if row["criterion"] == criterion and (row["seed"], row["allocation"]) in one]


def main() -> int:
    results = Results(Path(sys.argv[1]))
    looked_at = list(dict.fromkeys(row["method"] for row in results.rows if row["repair"] == "compensated"))
    criterion = "magnitude" if "magnitude" in looked_at else next(iter(looked_at), None)
    if criterion is None:
        print(f"{sys.argv[1]}: no compensated plans; this is for studies whose recipe has compensate")
        return 2
    for structure in results.structures:
        columns = [r for r in COLUMNS if all(rows_of(results, case, structure, criterion, r) for case in results.cases)]
        heads = [COLUMNS[repair].format(criterion) for repair in columns]
        lines, far = [], {head: [] for head in heads}  # type: ignore[var-annotated]
        tuned = bool(results.refined(structure, tuned=True))
        for case in results.cases:
            found = {h: rows_of(results, case, structure, criterion, r) for h, r in zip(heads, columns, strict=True)}
            line = [case, *(points(results.means(rows).values()) for rows in found.values())]
            for head, rows in found.items():
                far[head].append(statistics.fmean(means(rows, results.close).values()))
            if tuned:
                line.append(points(results.means(results.repaired(case, structure, "refined", tuned=True)).values()))
            dense = [results.first.scale * run["dense"]["test"][results.first.name]
                     for run in results.record.runs if run["case"] == case]  # fmt: skip
            lines.append([*line, points(dense)])
        print(f"{structure}, {', '.join(f'{s:g}' for s in results.sparsities(structure))}: {results.first.axis}\n")
        table(["case", *heads, *(["refined, fine-tuned"] if tuned else []), "dense"], lines)
        listed = ", ".join(f"{head} {statistics.fmean(values):.3f}" for head, values in far.items())
        print(f"{results.close.title}, mean over cases: {listed}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
