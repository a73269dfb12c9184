"""prunekit explain RUN pruned, and prunekit explain RUN/pruned/NAME: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, HowMany, JumpNodes, explained, how_many
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder
from prunekit.errors import UsageError


@form(
    headings=PANELS,
    examples={
        "What the mask of a pruned model broke": "prunekit explain runs/digits-cnn pruned small",
        "The same": "prunekit explain runs/digits-cnn/pruned/small",
    },
)
def pruned(
    run: RunFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the pruned model; left out behind RUN/pruned/NAME.")] = "",
    split: Annotated[str | None, typer.Option(help="scoring (the default), test or validation.")] = None,
    samples: HowMany = None,
    nodes: JumpNodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """What a mask is to blame for, and what a repair brought back."""
    from prunekit.verbs.pruned_folder import run_of

    if not name:
        if run.resolve().parent.name != "pruned":
            raise UsageError("explain RUN pruned: of what? Give NAME, or RUN/pruned/NAME alone")
        run, name = run_of(run), run.resolve().name
    explained(
        run, "pruned", name, split=split, samples=how_many(samples, "pruned"), nodes=nodes, device=device, quiet=quiet,
        as_json=as_json,
    )  # fmt: skip
