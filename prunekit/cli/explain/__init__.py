"""prunekit explain: a file of this folder parses, calls, prints."""

from __future__ import annotations

from prunekit.cli.explain.forms import Forms
from prunekit.cli.verb import verb


@verb(
    after="sensitivity",
    kind=Forms,
    examples={
        "Which answers are wrong": "prunekit explain runs/digits-cnn errors",
        "Which images and channels made one of them wrong": "prunekit explain runs/digits-cnn sample 12",
        "Which channels are behind all errors": "prunekit explain runs/digits-cnn channel conv3 --samples errors",
        "What a pruning broke": "prunekit explain runs/digits-cnn/pruned/small",
        "How two prunings differ": "prunekit explain runs/digits-cnn diff small better",
    },
)
def explain() -> None:
    """Say why an answer, a part or a pruning is what it is.

    From what the training run recorded: what a part or a sample gave, when, and from which data. Prints a short text and writes a
    page under RUN/explain.
    """
