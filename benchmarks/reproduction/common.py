"""What the experiments share: trained runs, the paper's target, tables, and the document that they go into."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from prunekit.kernel import ModelFunction
from prunekit.recipe import Recipe
from prunekit.verbs.run_folder import Run
from prunekit.verbs.training import train_run

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reproduction.md"
COMPONENTS = {
    "embedding": ("embedding.weight",),
    "attention": ("attention.projection.weight", "attention.combine.weight"),
    "MLP in": ("up.weight", "up.bias"),
    "MLP out": ("down.weight", "down.bias"),
    "decoder": ("classifier.weight",),
}
"""Of the transformer: component -> its parameters."""


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def trained(name: str, out: Path) -> Run:
    """The run of ``recipes/NAME.yaml``, trained under ``out`` unless it is there."""
    train_run(Recipe.load(ROOT / "recipes" / f"{name}.yaml"), out / name, announce=note)
    return Run(out / name)


def log_probabilities(out: Tensor, labels: Tensor) -> Tensor:
    """Of every class: what the paper's models put out, and so what its kernel rebuilds."""
    return F.log_softmax(out, -1)


def function_of(run: Run) -> ModelFunction:
    """The run's model with log-probabilities as a function of its weights."""
    return ModelFunction(run.model, run.trajectory.layout, run.trajectory.fixed, log_probabilities, run.device)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(value: float) -> str:
    """Three digits that matter, without an exponent where it can be."""
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def write_section(document: Path, name: str, text: str) -> None:
    """Replaces what lies between the marks of section ``name``; the text around them is a person's."""
    begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
    content = document.read_text(encoding="utf-8")
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), content, re.DOTALL)
    if found is None:
        raise SystemExit(f"{document}: has no marks for section {name}")
    document.write_text(content[: found.start()] + begin + text + end + content[found.end() :], encoding="utf-8")
