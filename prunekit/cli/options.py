"""Options that several verbs have, and how their text is read."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

from prunekit import bounded
from prunekit.errors import UsageError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that train or import made.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace artifacts that were made from other inputs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no tables.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; the recipe's by default.")]
STRUCTURES = ", ".join(file.name for file in iter_modules([str(Path(__file__).parents[1] / "structure" / "units")]))
"""Structures whose units leave whole. Their files are listed and not imported, since those need torch and help does not."""
STRUCTURE_HELP = (
    f"unstructured, {STRUCTURES}, units joined (heads+neurons), N:M (2:4), block:ROWSxCOLUMNS (block:4x1), module:structure"
)
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Overrides the recipe's seed.")]
Compensate = Annotated[bool, typer.Option("--compensate", help="Let kept weights make up for removed ones.")]
RefineTokens = Annotated[
    str | None,
    typer.Option("--refine-tokens", metavar="500k", help="Learn a mask from so many training tokens; implies --refine."),
]
TokensOption = Annotated[
    str | None,
    typer.Option("--tokens", metavar="900k", help="Learn mask and weights; short tries say how best. Without tokens: samples."),
]
TuneTokens = Annotated[
    str | None,
    typer.Option(
        "--tune-tokens", metavar="500k", help="Train on by KL to the dense model, on so many tokens (of data without: samples)."
    ),
]
Finetune = Annotated[float | None, typer.Option("--finetune", metavar="EPOCHS", help="Train on so long, in every round.")]
Lora = Annotated[
    int | None, typer.Option("--lora", min=1, metavar="RANK", help="Train matrices of this rank beside the weights alone.")
]
Rate = Annotated[float | None, typer.Option("--lr", help="Of fine-tuning; the dense training's, or searched for.")]
Distill = Annotated[float | None, typer.Option("--distill", metavar="WEIGHT", help="Of the dense model's soft labels.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Of the soft labels.")]
RecordEvery = Annotated[
    int | None, typer.Option("--record-every", min=1, metavar="N", help="Of fine-tuning, keep a state every N steps.")
]
CRITERION_HELP = (
    "Name of a criterion, or all; repeatable. With options: 'influence(target=margin,aggregation=l2)'; composed: "
    "'influence^0.25*magnitude^0.75', 'rank(influence)+rank(magnitude)', 'tempered(influence)'; your own: module:criterion."
)


def json_object(text: str, option: str) -> dict[str, Any]:
    try:
        found = bounded.parsed(text)
    except ValueError as error:
        raise UsageError(f"{option} is {text[:60]!r}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{option} is {text[:60]!r}; it must be a JSON object such as '{{\"width\": 32}}'")
    return found


def numbers(text: str | None, option: str) -> list[int]:
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} is {text!r}; write whole numbers, such as 3,5")
    return [int(part) for part in parts]


def ratios(given: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        pattern, _, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--ratio is {text!r}; write PATTERN=SHARE, for example 'conv1*=0.3'") from None
        if pattern in found:
            raise UsageError(f"--ratio: {pattern!r} is given twice")
        found[pattern] = value
    return found


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(
            f"--name is {name!r}; use letters, digits, '.', '_' and '-', beginning with a letter or digit, 100 at most"
        )
