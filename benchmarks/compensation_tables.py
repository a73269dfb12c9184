"""Table of docs/criteria.md on compensated weights, from `prunekit compare recipes/compensation.yaml --out DIR`.

    python benchmarks/compensation_tables.py DIR

Test accuracy in percent and KL to the dense model: the mean over the sparsities, and the standard deviation over seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from refine_tables import Results, means, points, table

COLUMNS = {
    "magnitude": "",
    "magnitude, compensated": "compensated",
    "refined": "refined",
    "refined, compensated": "refined+compensated",
}


def main() -> int:
    folder = Path(sys.argv[1])
    results = Results(folder)
    runs = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["runs"]
    for structure in dict.fromkeys(row["structure"] for row in results.rows):
        lines, kl = [], {name: [] for name in COLUMNS}  # type: ignore[var-annotated]
        trained = any(results.repaired(case, structure, "refined", tuned=True) for case in results.cases)
        for case in results.cases:
            line = [case]
            for name, repair in COLUMNS.items():
                rows = results.repaired(case, structure, repair)
                if not repair:  # in the allocation whose weights are compensated
                    one = results.method(case, structure, "magnitude", "compensated")[0]["allocation"]
                    rows = [row for row in rows if (row["criterion"], row["allocation"]) == ("magnitude", one)]
                line.append(points(means(rows).values()))
                kl[name].append(statistics.fmean(means(rows, "test_kl", 1).values()))
            if trained:
                line.append(points(means(results.repaired(case, structure, "refined", tuned=True)).values()))
            dense = [100 * run["dense"]["test"]["accuracy"] for run in runs if run["case"] == case]
            lines.append([*line, points(dense)])
        sparsities = sorted({float(row["sparsity"]) for row in results.rows if row["structure"] == structure})
        print(f"{structure}, {', '.join(f'{s:g}' for s in sparsities)}\n")
        table(["case", *COLUMNS, *(["refined, fine-tuned"] if trained else []), "dense"], lines)
        print("KL, mean over cases: " + ", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in kl.items()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
