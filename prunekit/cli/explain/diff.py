"""prunekit explain RUN diff: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, HowMany, JumpNodes, Split, explained, how_many
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which answers a pruning changed, and by what it removed": "prunekit explain runs/digits-cnn diff small",
        "Blame of two pruned models, side by side": "prunekit explain runs/digits-cnn diff small better",
    },
)
def diff(
    run: RunFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a pruned model.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Of another, to compare the masks of both.")] = "",
    split: Split = None,
    samples: HowMany = None,
    nodes: JumpNodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Which answers a pruning changed, or how two prunings differ."""
    explained(
        run, "diff", name, other, split=split, samples=how_many(samples, "diff"), nodes=nodes, device=device, quiet=quiet,
        as_json=as_json,
    )  # fmt: skip
