"""The tables and the picture of docs/language-models.md, from a finished ``recipes/lm-comparison*.yaml``.

    prunekit compare recipes/lm-comparison-small.yaml --out runs/lm-comparison-small --jobs 2
    python benchmarks/lm_tables.py runs/lm-comparison-small docs/images/language-models.png

KL to the dense model in nats a token, on test data, means over the study's seeds; in brackets perplexity. The picture has
perplexity over sparsity, a line a way.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

ONE_SHOT = {"magnitude": "magnitude", "taylor": "Taylor", "influence": "influence", "flap": "FLAP"}
WAYS = {
    "wanda": "Wanda", "sparsegpt": "SparseGPT", "admm": "ADMM", "leap": "gates (LEAP)", "maskllm": "patterns (MaskLLM)",
    "refit": "given units, layers refitted", "streamed": "**mask learnt**", "streamed+refit": "**mask learnt, layers refitted**",
    "block-reconstruction": "blocks reconstructed", "tuned": "weights tuned",
    "admm+tuned": "ADMM, then weights tuned", "streamed+tuned": "**mask learnt, then weights tuned**",
    "streamed+refit+tuned": "**mask learnt, layers refitted, then weights tuned**",
}  # fmt: skip
MARKERS = "os^vDPX"
KEEPS_WEIGHTS = {"magnitude", "taylor", "influence", "flap", "wanda", "leap", "maskllm", "streamed"}
Column = tuple[str, float]


def figures(folder: Path) -> dict[str, dict[str, dict[Column, list[tuple[float, float]]]]]:
    """Case -> way -> (structure, sparsity) -> KL and perplexity by seed; of one-shot criteria the better allocation's by KL."""
    best: dict[tuple[str, ...], tuple[float, float]] = {}
    with (folder / "compare.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            way = row["repair"] or (row["criterion"] if row["criterion"] in ONE_SHOT else "")
            if not way:
                continue
            key = (row["case"], way, row["structure"], row["sparsity"], row["seed"])
            found = float(row["test_kl"]), float(row["test_perplexity"])
            best[key] = min(best.get(key, found), found)
    told: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (case, way, structure, sparsity, _), found in best.items():
        told[case][way][structure, float(sparsity)].append(found)
    return told


def table(ways: dict[str, dict[Column, list[tuple[float, float]]]], dense: float) -> str:
    columns = sorted({column for cells in ways.values() for column in cells}, key=lambda c: (c[0] != "unstructured", c))
    title = [f"{sparsity:g}" if structure == "unstructured" else f"{structure} {sparsity:g}" for structure, sparsity in columns]
    lines = [f"| dense perplexity {dense:.1f} | " + " | ".join(title) + " |", "|---" * (len(columns) + 1) + "|"]
    for way, name in (ONE_SHOT | WAYS).items():
        if way not in ways:
            continue
        cells = []
        for column in columns:
            found = ways[way].get(column)
            kl, perplexity = (statistics.fmean(values) for values in zip(*found, strict=True)) if found else (None, None)
            cells.append("" if kl is None else f"{kl:.4f} ({perplexity:.1f})")
        lines.append(f"| {name}{'' if way in KEEPS_WEIGHTS else ' †'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(told: dict[str, dict[str, dict[Column, list[tuple[float, float]]]]], dense: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(told), figsize=(5.5 * len(told), 4.2), squeeze=False)
    for axis, (case, ways) in zip(axes[0], told.items(), strict=True):
        for number, (way, name) in enumerate((ONE_SHOT | WAYS).items()):
            line = sorted((s, found) for (structure, s), found in ways.get(way, {}).items() if structure == "unstructured")
            if line:
                means = [statistics.fmean(perplexity for _, perplexity in found) for _, found in line]
                style = {"color": plt.get_cmap("tab20")(number), "lw": 2.4 if "**" in name else 1.2}
                axis.plot(
                    [s for s, _ in line], means, f"{MARKERS[number % len(MARKERS)]}-", label=name.replace("**", ""), **style
                )
        axis.axhline(dense[case], color="grey", ls=":", label="dense")
        axis.set(title=case, xlabel="share of weights removed", yscale="log")
    axes[0][0].set_ylabel("test perplexity")
    axes[0][-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("image", type=Path, nargs="?")
    asked = parser.parse_args()
    told = figures(asked.study)
    runs = json.loads((asked.study / "compare.json").read_text(encoding="utf-8"))["runs"]
    dense = {case: statistics.fmean(run["dense"]["test"]["perplexity"] for run in runs if run["case"] == case) for case in told}
    for case, ways in told.items():
        print(f"\n**{case}**\n\n{table(ways, dense[case])}")
    if asked.image:
        picture(told, dense, asked.image)


if __name__ == "__main__":
    main()
