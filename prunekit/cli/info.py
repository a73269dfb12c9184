"""prunekit info: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunekit.cli.options import Json
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.remote import placed

PATH_HELP = "Any artifact, run folder or recipe; of an address for fsspec, as s3://bucket/study, a recording or a study."


@verb(
    after="run",
    examples={
        "A run folder": "prunekit info runs/digits-cnn",
        "A score file": "prunekit info runs/digits-cnn/scores/influence.safetensors",
        "A pruned model": "prunekit info runs/digits-cnn/pruned/small",
    },
)
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help=PATH_HELP)],
    as_json: Json = False,
) -> None:
    """Say what a file is, what it was made from, what it cost."""
    from prunekit.imports import no_code
    from prunekit.verbs.info import info as describe

    with no_code("info"):
        result = describe(placed(path))
    output = Output(False, as_json)
    output.show(show_info, result)
    output.finish(result)


def show_info(result: dict[str, Any]) -> None:
    _tree(result, "")


def _tree(value: dict[str, Any], indent: str) -> None:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{key}:")
            _tree(inner, indent + "  ")
        else:
            print(f"{indent}{key}: {inner}")
