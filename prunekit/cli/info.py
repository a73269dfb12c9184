"""prunekit info: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.options import (
    Json,
)
from prunekit.cli.output import Output
from prunekit.cli.panels import panels
from prunekit.cli.top import app


@app.command(cls=panels({}), epilog="Example: prunekit info runs/digits-cnn/scores/influence.safetensors")
def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Any artifact, run folder or recipe.")], as_json: Json = False
) -> None:
    """Say what an artifact is, what it was made from, and what it cost."""
    from prunekit.imports import no_code
    from prunekit.verbs.info import info as describe

    with no_code("info"):
        result = describe(path)
    output = Output(False, as_json)
    output.show("info", result)
    output.finish(result)
