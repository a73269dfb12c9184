"""What the forms of explain have in common: their options, and the call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import numbers
from prunekit.cli.output import Output
from prunekit.errors import UsageError

Split = Annotated[str | None, typer.Option(help="test (the default), validation or scoring.")]
WITH_TRAIN = "test (the default), validation, scoring or train."
Which = Annotated[
    str | None,
    typer.Option(metavar="N | errors | 3,17", help="How many at most (64), the errors, or numbers (3,17; 3, for one)."),
]
HowMany = Annotated[str | None, typer.Option(metavar="N", help="How many samples are looked at, at most.")]
Target = Annotated[str | None, typer.Option(help="error, answer, right, a class (7), 7-3, or a target of the task.")]
Position = Annotated[int | None, typer.Option(min=0, help="Of one token of a text, to explain its log-probability alone.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Parts of a kind that are named; 20 by default.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Of a training step: more are slower and more exact.")]
JumpNodes = Annotated[int | None, typer.Option(min=1, help="Of the pruning: more are slower and more exact.")]
Pruned = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Look at this pruned model only; repeatable.")]

PANELS = {
    "What is looked at": ("split", "samples", "target", "position", "pruned"),
    "How much is told, how exactly": ("limit", "nodes"),
}


def explained(
    run: Path, what: str, name: str = "", index: str = "", *, device: str | None, quiet: bool, as_json: bool, **asked: Any
) -> None:
    """Explains, writes the page and prints; ``asked`` are the options of ``prunekit.verbs.explaining.explain_run``."""
    from prunekit.report.terminal.explaining import show_explanation
    from prunekit.verbs.explaining import explain_run

    output = Output(quiet, as_json)
    opened = open_run(run, device)
    with output.working(run):
        result = explain_run(opened, what, name, index, **asked)
    output.show(show_explanation, result)
    output.finish(result)


def how_many(text: str | None, form: str) -> int | None:
    """``--samples`` of a form whose samples are not chosen."""
    if text is not None and (text == "errors" or "," in text):
        raise UsageError(
            f"explain RUN {form}: --samples is {text!r}; samples are chosen for layer, channel, head and weight; of {form} only "
            "how many can be said, such as 64"
        )
    found = which(text)
    return found if isinstance(found, int) else None


def which(text: str | None) -> int | str | list[int] | None:
    """What ``--samples`` says: how many, ``errors``, or which (``3,`` is the one of that number)."""
    if text is None or text == "errors":
        return text
    if "," in text:
        return numbers(text.removesuffix(","), "--samples")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--samples is {text!r}; give how many at most (64), errors, or numbers (3,17; 3, for that one alone)")
    return int(text)
