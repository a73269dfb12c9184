"""prunekit sensitivity: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Device, Json, Overwrite, Quiet, RunFolder
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    after="eval",
    shared=True,
    headings={"What is pruned": ("criterion", "structure", "sparsity")},
    examples={
        "How much each layer bears": "prunekit sensitivity runs/digits-cnn --criterion magnitude",
        "In channels, at two sparsities": "prunekit sensitivity runs/digits-cnn --structure channels --sparsity 0.5 "
        "--sparsity 0.8",
    },
)
def sensitivity(
    run: RunFolder,
    criterion: Annotated[str, typer.Option("--criterion", "-c", help="Decides what goes inside a layer.")] = "magnitude",
    structure: Annotated[str, typer.Option(help="unstructured, channels, …")] = "unstructured",
    sparsity: Annotated[list[float] | None, typer.Option(help="Share to remove of a layer; repeatable.")] = None,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say how much each layer bears, pruned alone.

    The task's first measure by layer and sparsity, on validation data.
    """
    from prunekit.report.terminal.comparing import show_sensitivity
    from prunekit.verbs.sensitivity import sensitivity_run

    output = Output(quiet, as_json)
    opened = open_run(run, device)
    with output.working(run):
        found, path, reused = sensitivity_run(opened, structure, criterion, sparsity or [], overwrite)
    output.show(show_sensitivity, (found, path, reused))
    output.finish({**found.content(), "path": str(path), "reused": reused})
