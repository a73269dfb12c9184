"""prunekit explain RUN channel: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, Limit, Nodes, Position, Pruned, Split, Target, Which, explained, which
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which channels of a layer gave most": "prunekit explain runs/digits-cnn channel conv3",
        "What one channel gave, when, and from which training samples": "prunekit explain runs/digits-cnn channel conv2 7",
    },
)
def channel(
    run: RunFolder,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="The layer whose channels they are.")],
    unit: Annotated[str, typer.Argument(metavar="UNIT", help="Its number; without it all of the group are ranked.")] = "",
    split: Split = None,
    samples: Which = None,
    target: Target = None,
    position: Position = None,
    pruned: Pruned = None,
    limit: Limit = None,
    nodes: Nodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """What a channel gave, or which of a layer's gave most."""
    explained(
        run, "channel", group, unit, split=split, samples=which(samples), target=target, position=position, only=pruned,
        limit=limit, nodes=nodes, device=device, quiet=quiet, as_json=as_json,
    )  # fmt: skip
