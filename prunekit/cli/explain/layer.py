"""prunekit explain RUN layer: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, Limit, Nodes, Position, Pruned, Split, Target, Which, explained, which
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which layers are behind the errors": "prunekit explain runs/digits-cnn layer --samples errors",
        "What one layer gave, when, and what is inside it": "prunekit explain runs/digits-cnn layer conv2",
    },
)
def layer(
    run: RunFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As the model names it; without it all layers are ranked.")] = "",
    split: Split = None,
    samples: Which = None,
    target: Target = None,
    position: Position = None,
    pruned: Pruned = None,
    limit: Limit = None,
    nodes: Nodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """What a layer gave, or which layers gave most."""
    explained(
        run, "layer", name, split=split, samples=which(samples), target=target, position=position, only=pruned,
        limit=limit, nodes=nodes, device=device, quiet=quiet, as_json=as_json,
    )  # fmt: skip
