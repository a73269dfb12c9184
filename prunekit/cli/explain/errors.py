"""prunekit explain RUN errors: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, WITH_TRAIN, explained
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which test answers are wrong, most wrong first": "prunekit explain runs/digits-cnn errors",
        "The five worst of the training split": "prunekit explain runs/digits-cnn errors --split train --limit 5",
    },
)
def errors(
    run: RunFolder,
    split: Annotated[str | None, typer.Option(help=WITH_TRAIN)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Errors that are listed; 20 by default.")] = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Samples that are answered wrong, or lose most, most wrong first."""
    explained(run, "errors", split=split, limit=limit, device=device, quiet=quiet, as_json=as_json)
