"""docs/zoo.md: the table, what was refused and why, what is at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from benchmarks.zoo.cells import FAULT, REFUSED, WORKS, Cell
from benchmarks.zoo.entry import STEPS
from benchmarks.zoo.steps import counted
from benchmarks.zoo.table import MODELS

Results = Mapping[str, Mapping[str, Cell]]
FAMILIES = {"tv": "torchvision", "timm": "timm", "hf": "transformers"}


def totals(results: Results) -> dict[str, int]:
    """``works``, ``refused`` and ``fault`` among the cells that make sense, and how many of these there are."""
    cells = [cell for name, row in results.items() for step, cell in row.items() if counted(MODELS[name], step, cell)]
    found = Counter(cell.verdict for cell in cells)
    return {"cells": len(cells), **{verdict: found[verdict] for verdict in (WORKS, REFUSED, FAULT)}}


def page(results: Results, seconds: float, skipped: Mapping[str, str]) -> str:
    """The whole of docs/zoo.md."""
    sums = totals(results)
    share = 100 * sums[WORKS] / max(sums["cells"], 1)
    parts = [
        "# The zoo: kinds of models × steps\n",
        "Written by `make zoo` (`python -m benchmarks.zoo`). Every model is small, has random weights, and is walked by the "
        "command line: imported with its checkpoint, trained for 4 recorded steps, scored, pruned, refined, evaluated, loaded, "
        "explained. Its user wrote two factories, for the model and for the data, and nothing else; where the task is not "
        "classification, its name.\n",
        "*✓*: it works. In every cell that cuts, the pruned model computes what the masked one does to 1e-5, what is loaded "
        "computes exactly what was saved, and parameters and MACs fall; the share that went of the prunable parameters is given. "
        "Taylor and Fisher are those of plain autograd. *r*: refused, in one line that names the cause, listed below. *·*: "
        "refused, and it would make no sense. *✗*: a fault.\n",
        f"{sums['cells']} cells make sense: {sums[WORKS]} work ({share:.1f} %), {sums[REFUSED]} are refused, {sums[FAULT]} are "
        f"at fault. {len(results)} models, {seconds / 60:.0f} minutes.\n",
        _table(results),
        _refusals(results),
        _faults(results),
    ]
    if skipped:
        parts.append("Left out: " + "; ".join(f"{name} (needs {package})" for name, package in skipped.items()) + ".\n")
    return "\n".join(part for part in parts if part)


def _table(results: Results) -> str:
    lines = ["| model | task | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 2) + "|"]
    for name, row in results.items():
        cells = " | ".join(_mark(name, step, row.get(step)) for step in STEPS)
        lines.append(f"| {_shown(name)} | {MODELS[name].task.replace('_', ' ')} | {cells} |")
    return "\n".join(lines) + "\n"


def _shown(name: str) -> str:
    family, _, rest = name.partition("_")
    return f"{FAMILIES[family]} {rest}" if family in FAMILIES else name.replace("_", " ")


def _mark(name: str, step: str, cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.verdict == WORKS:
        return f"✓ {cell.why}" if cell.why.endswith("%") else "✓"
    if cell.verdict == REFUSED:
        return "r" if counted(MODELS[name], step, cell) else "·"
    return "✗"


def _refusals(results: Results) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for name, row in results.items():
        for step, cell in row.items():
            if cell.verdict == REFUSED:
                found.setdefault((step, cell.why), []).append(_shown(name))
    lines = [f"- {step}, {', '.join(names)}: {_plain(why)}" for (step, why), names in found.items()]
    return "## Refused\n\n" + "\n".join(lines) + "\n" if lines else ""


def _faults(results: Results) -> str:
    lines = [
        f"- {step}, {_shown(name)}: {_plain(cell.why)}" + (f" ({cell.where})" if cell.where else "")
        for name, row in results.items()
        for step, cell in row.items()
        if cell.verdict == FAULT
    ]
    return "## Faults\n\n" + "\n".join(lines) + "\n" if lines else ""


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*").replace("|", "\\|")
