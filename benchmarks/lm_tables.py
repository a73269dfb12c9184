"""The tables and the picture of docs/language-models.md, from a finished ``recipes/lm-comparison*.yaml``.

    prunekit compare recipes/lm-comparison-small.yaml --out runs/lm-comparison-small --jobs 2
    python benchmarks/lm_tables.py runs/lm-comparison-small docs/images/language-models.png

KL to the dense model in nats a token, on test data, means over the study's seeds; in brackets perplexity. One table of weights
removed and one of units; then, of every column, what our ways have of their best rival's KL, each seed's. The picture has
by how much perplexity is above the dense model's over sparsity, a line a way.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import Any

ONE_SHOT = {
    "magnitude": "magnitude", "taylor": "Taylor", "influence": "influence", "flap": "FLAP", "kfac": "**kfac**", "reap": "REAP",
    "block_influence": "block influence",
}  # fmt: skip
WAYS = {
    "wanda": "Wanda", "sparsegpt": "SparseGPT", "kfac sparsegpt": "**SparseGPT, shares by kfac**", "admm": "ADMM",
    "kfac admm": "**ADMM, shares by kfac**", "leap": "gates (LEAP)", "maskllm": "patterns (MaskLLM)",
    "flap refit": "FLAP's units, layers refitted", "kfac refit": "**kfac's units, layers refitted**",
    "influence refit": "**influence's units, layers refitted**",
    "block_influence refit": "**block influence's units, layers refitted**",
    "reap refit": "**REAP's units, layers refitted**",
    "streamed": "**mask learnt**", "streamed+refit": "**mask learnt, layers refitted**",
    "block-reconstruction": "blocks reconstructed", "tuned": "weights tuned", "flap tuned": "FLAP's units, weights tuned",
    "kfac tuned": "**kfac's units, weights tuned**", "flap refit+tuned": "FLAP's units, layers refitted, then weights tuned",
    "taylor tuned": "Taylor's units, weights tuned", "influence tuned": "**influence's units, weights tuned**",
    "reap tuned": "REAP's units, weights tuned", "block_influence tuned": "block influence's units, weights tuned",
    "influence refit+tuned": "**influence's units, layers refitted, then weights tuned**",
    "block_influence refit+tuned": "**block influence's units, layers refitted, then weights tuned**",
    "reap refit+tuned": "**REAP's units, layers refitted, then weights tuned**",
    "kfac refit+tuned": "**kfac's units, layers refitted, then weights tuned**", "admm+tuned": "ADMM, then weights tuned",
    "kfac admm+tuned": "**ADMM, shares by kfac, then weights tuned**",
    "streamed+tuned": "**mask learnt, then weights tuned**",
    "streamed+refit+tuned": "**mask learnt, layers refitted, then weights tuned**", "together": "**mask and weights together**",
    "admm+together": "**ADMM, then mask and weights together**",
    "kfac admm+together": "**ADMM, shares by kfac, then mask and weights together**",
}  # fmt: skip
STARTS = ("kfac", "flap", "taylor", "influence", "reap", "block_influence")
"""Criteria whose plans ways begin with, where that matters: units, and how much of each layer goes."""
MARKERS = "os^vDPX"
KEEPS_WEIGHTS = {*ONE_SHOT, "wanda", "leap", "maskllm", "streamed"}
LAYERWISE = ("wanda", "sparsegpt", "admm")
CRITERIA_OF_UNITS = ("magnitude", "taylor", "flap", "reap", "block_influence")
TUNED_UNITS = tuple(f"{name} tuned" for name in CRITERIA_OF_UNITS)
LEARNT_AS_LONG = ("tuned", "leap", "maskllm", "block-reconstruction")
BOTH = ("together", "admm+together", "kfac admm+together")
RIVALS = (
    ("mask learnt / best layer-wise", ("streamed",), LAYERWISE),
    ("mask learnt / ADMM, shares by kfac", ("streamed",), ("kfac admm",)),
    ("mask learnt / gates and patterns", ("streamed",), ("leap", "maskllm")),
    ("mask, then weights / tuning, gates, reconstruction", ("streamed+tuned",), LEARNT_AS_LONG),
    ("mask, then weights / ADMM, then weights", ("streamed+tuned",), ("admm+tuned",)),
    ("together / tuning, gates, reconstruction", BOTH, LEARNT_AS_LONG),
    ("together / ADMM, then weights", BOTH, ("admm+tuned",)),
    ("together / ADMM, shares by kfac, then weights", BOTH, ("kfac admm+tuned",)),
    ("together / mask, or mask, then weights", BOTH, ("streamed", "streamed+tuned")),
    ("together from ADMM / together from the plan", BOTH[1:], BOTH[:1]),
    ("kfac / other criteria", ("kfac",), ("magnitude", "taylor", "influence", "flap", "wanda")),
    ("SparseGPT, shares by kfac / SparseGPT", ("kfac sparsegpt",), ("sparsegpt",)),
    ("ADMM, shares by kfac / ADMM", ("kfac admm",), ("admm",)),
    ("ADMM, shares by kfac, then weights / ADMM, then weights", ("kfac admm+tuned",), ("admm+tuned",)),
    ("units learnt and refitted / best criterion", ("streamed+refit",), CRITERIA_OF_UNITS),
    ("units learnt / best criterion", ("streamed",), CRITERIA_OF_UNITS),
    ("influence's units / best criterion", ("influence",), CRITERIA_OF_UNITS),
    ("units learnt, then tuned / best criterion's, tuned", ("streamed+tuned",), TUNED_UNITS),
    ("units learnt, refitted, tuned / best criterion's, tuned", ("streamed+refit+tuned",), TUNED_UNITS),
    ("influence's units, tuned / best criterion's, tuned", ("influence tuned",), TUNED_UNITS),
    ("influence's units, refitted / best criterion", ("influence refit",), CRITERIA_OF_UNITS),
    ("block influence's units, refitted / best criterion", ("block_influence refit",), CRITERIA_OF_UNITS),
    ("influence's units, refitted, tuned / best criterion's, tuned", ("influence refit+tuned",), TUNED_UNITS),
    ("block influence's units, refitted, tuned / best criterion's, tuned", ("block_influence refit+tuned",), TUNED_UNITS),
    ("REAP's units, refitted / best criterion", ("reap refit",), CRITERIA_OF_UNITS),
    ("REAP's units, refitted, tuned / best criterion's, tuned", ("reap refit+tuned",), TUNED_UNITS),
    ("kfac's units, refitted / best criterion", ("kfac refit",), CRITERIA_OF_UNITS),
    ("kfac's units, refitted / FLAP's, refitted", ("kfac refit",), ("flap refit",)),
    ("kfac's units, refitted, tuned / FLAP's, tuned", ("kfac refit+tuned",), ("flap tuned",)),
    ("kfac's units, refitted, tuned / FLAP's, refitted, tuned", ("kfac refit+tuned",), ("flap refit+tuned",)),
)
"""What is compared: ours, of which the last that was run counts, and rivals, of which the best does."""
Column = tuple[str, float]


def figures(folder: Path) -> dict[str, dict[str, dict[Column, list[tuple[float, float]]]]]:
    """Case -> way -> (structure, sparsity) -> test KL and perplexity by seed.

    Of a criterion's allocations, the one that is best on validation data.
    """
    best: dict[tuple[str, ...], tuple[float, float, float]] = {}
    with (folder / "compare.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            start, repair = row["criterion"], row["repair"]
            way = repair or (start if start in ONE_SHOT or start == "wanda" else "")
            if repair and start in STARTS and "streamed" not in repair:
                way = f"{start} {repair}"
            if not way or (way == "kfac" and row["allocation"] == "rows"):  # rows would leave out what it says of layers
                continue
            key = (row["case"], way, row["structure"], row["sparsity"], row["seed"])
            found = float(row["validation_kl"]), float(row["test_kl"]), float(row["test_perplexity"])
            best[key] = min(best.get(key, found), found, key=itemgetter(0))
    told: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (case, way, structure, sparsity, _), (_, kl, perplexity) in best.items():
        told[case][way][structure, float(sparsity)].append((kl, perplexity))
    return told


def of_units(column: Column) -> bool:
    return column[0] != "unstructured" and ":" not in column[0]


def table(ways: dict[str, dict[Column, list[tuple[float, float]]]], dense: float, units: bool) -> str:
    """A row a way that has figures, a column a structure and sparsity: of weights, or of units."""
    columns = sorted({column for cells in ways.values() for column in cells if of_units(column) == units}, key=in_order)
    lines = [f"| dense perplexity {dense:.1f} | " + " | ".join(map(titled, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for way, name in (ONE_SHOT | WAYS).items():
        if not any(column in ways.get(way, {}) for column in columns):
            continue
        cells = []
        for column in columns:
            found = ways[way].get(column)
            kl, perplexity = (statistics.fmean(values) for values in zip(*found, strict=True)) if found else (None, None)
            cells.append("" if kl is None else f"{kl:.4f} ({perplexity:.1f})")
        lines.append(f"| {name}{'' if way in KEEPS_WEIGHTS else ' †'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_order(column: Column) -> tuple[bool, Column]:
    return column[0] != "unstructured", column


def titled(column: Column) -> str:
    structure, sparsity = column
    return f"{sparsity:g}" if structure == "unstructured" else structure if ":" in structure else f"{structure} {sparsity:g}"


def ratios(ways: dict[str, dict[Column, list[tuple[float, float]]]]) -> str:
    """Ours over the best rival's KL, of every seed; where ours are several, the last."""
    lines = []
    for name, ours, rivals in RIVALS:
        columns = sorted({column for way in ours for column in ways.get(way, {})}, key=in_order)
        if "units" in name:
            columns = [column for column in columns if of_units(column)]
        told = []
        for column in columns:
            mine = [found for way in ours if (found := kls(ways, way, column))][-1]
            theirs = [found for way in rivals if (found := kls(ways, way, column))]
            if theirs:
                each = [one / min(others) for one, *others in zip(mine, *theirs, strict=True)]
                told.append(f"{titled(column)}: {', '.join(f'{value:.2f}' for value in each)}")
        if told:
            lines.append(f"- {name}: {'; '.join(told)}")
    return "\n".join(lines)


def kls(ways: dict[str, dict[Column, list[tuple[float, float]]]], way: str, column: Column) -> list[float]:
    return [kl for kl, _ in ways.get(way, {}).get(column, [])]


def picture(told: dict[str, dict[str, dict[Column, list[tuple[float, float]]]]], dense: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(told), figsize=(5.5 * len(told), 4.2), squeeze=False)
    for axis, (case, ways) in zip(axes[0], told.items(), strict=True):
        lines = {
            name: sorted((s, found) for (structure, s), found in ways.get(way, {}).items() if structure == "unstructured")
            for way, name in (ONE_SHOT | WAYS).items()
        }
        for number, (name, line) in enumerate((name, line) for name, line in lines.items() if line):
            means = [statistics.fmean(perplexity for _, perplexity in found) - dense[case] for _, found in line]
            style = {"color": plt.get_cmap("tab20")(number), "lw": 2.4 if "**" in name else 1.2}
            axis.plot([s for s, _ in line], means, f"{MARKERS[number % len(MARKERS)]}-", label=name.replace("**", ""), **style)
        axis.set(title=case, xlabel="share of weights removed", yscale="log")
    axes[0][0].set_ylabel("test perplexity above the dense model's")
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
        kinds = sorted({of_units(column) for cells in ways.values() for column in cells})
        tables = "\n\n".join(table(ways, dense[case], units) for units in kinds)
        print(f"\n**{case}**\n\n{tables}\n\n{ratios(ways)}")
    if asked.image:
        picture(told, dense, asked.image)


if __name__ == "__main__":
    main()
