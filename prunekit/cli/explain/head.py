"""prunekit explain RUN head: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, Limit, Nodes, Position, Pruned, Split, Target, Which, explained, which
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which heads of an attention gave most": "prunekit explain runs/digits-transformer head layers.0.attention",
        "What one gave, when, from which training samples": "prunekit explain runs/digits-transformer head layers.0.attention 3",
    },
)
def head(
    run: RunFolder,
    attention: Annotated[str, typer.Argument(metavar="ATTENTION", help="The attention whose heads they are.")],
    unit: Annotated[str, typer.Argument(metavar="UNIT", help="Its number; without it all of the attention are ranked.")] = "",
    split: Split = None,
    samples: Which = None,
    target: Target = None,
    position: Position = None,
    pruned: Pruned = None,
    limit: Limit = None,
    nodes: Nodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """What a head gave, or which of an attention's gave most."""
    explained(
        run, "head", attention, unit, split=split, samples=which(samples), target=target, position=position, only=pruned,
        limit=limit, nodes=nodes, device=device, quiet=quiet, as_json=as_json,
    )  # fmt: skip
