"""prunekit explain RUN weight: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, Limit, Nodes, Position, Pruned, Split, Target, Which, explained, which
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which weights of a parameter gave most": "prunekit explain runs/digits-cnn weight conv2.weight",
        "What one gave, when, and from which training samples": "prunekit explain runs/digits-cnn weight conv2.weight 7,3,1,1",
    },
)
def weight(
    run: RunFolder,
    parameter: Annotated[str, typer.Argument(metavar="PARAMETER", help="As the model names it.")],
    place: Annotated[str, typer.Argument(metavar="PLACE", help="One number an axis (7,3,1,1); without it all are ranked.")] = "",
    split: Split = None,
    samples: Which = None,
    target: Target = None,
    position: Position = None,
    pruned: Pruned = None,
    limit: Limit = None,
    nodes: Nodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """What a weight gave, or which of a parameter's gave most."""
    explained(
        run, "weight", parameter, place, split=split, samples=which(samples), target=target, position=position, only=pruned,
        limit=limit, nodes=nodes, device=device, quiet=quiet, as_json=as_json,
    )  # fmt: skip
