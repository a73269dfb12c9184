"""prunekit explain RUN sample: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.explain.asking import PANELS, WITH_TRAIN, Limit, Nodes, Position, Pruned, Target, explained, how_many
from prunekit.cli.explain.forms import form
from prunekit.cli.options import Device, Json, Quiet, RunFolder


@form(
    headings=PANELS,
    examples={
        "Which images and channels made this answer": "prunekit explain runs/digits-cnn sample 12",
        "Why 7 rather than 3": "prunekit explain runs/digits-cnn sample 12 --target 7-3",
        "What a training sample gave to the test answers": "prunekit explain runs/digits-cnn sample 20 --split train",
    },
)
def sample(
    run: RunFolder,
    number: Annotated[str, typer.Argument(metavar="NUMBER", help="Of the sample in its split.")],
    split: Annotated[str | None, typer.Option(help=WITH_TRAIN)] = None,
    target: Target = None,
    position: Position = None,
    samples: Annotated[str | None, typer.Option(metavar="N", help="With --split train: of how many test samples (64).")] = None,
    pruned: Pruned = None,
    limit: Limit = None,
    nodes: Nodes = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """What made one answer: layers, channels, heads, training samples.

    Of a wrong answer, the answered class's output less the right one's is explained; of a right one, the answered class's output.
    With --split train: what that training sample gave to the classes of the first --samples test samples.
    """
    explained(
        run, "sample", number, split=split, target=target, position=position, samples=how_many(samples, "sample"), only=pruned,
        limit=limit, nodes=nodes, device=device, quiet=quiet, as_json=as_json,
    )  # fmt: skip
