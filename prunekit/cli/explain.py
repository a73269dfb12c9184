"""prunekit explain: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Device, Json, Quiet, numbers
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError

SAMPLES = "How many at most (64), or which: errors, numbers (3,17; 3, for one). Parts take all of these."


@verb(
    after="sensitivity",
    example="prunekit explain runs/digits-cnn errors; prunekit explain runs/digits-cnn sample 12",
    headings={
        "What is looked at": ("split", "samples", "target", "pruned"),
        "How much, how exactly": ("limit", "nodes"),
    },
)
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN | RUN/pruned/NAME", help="A run, or a pruned model and nothing more.")],
    what: Annotated[str, typer.Argument(metavar="WHAT", help="One of the forms above.")] = "",
    name: Annotated[str, typer.Argument(metavar="NAME", help="A parameter, group or layer; a sample; a pruned model.")] = "",
    index: Annotated[str, typer.Argument(metavar="[INDEX]", help="Of a weight, channel or head; diff: another model.")] = "",
    split: Annotated[str | None, typer.Option(help="test, validation, scoring; train for a training sample, errors.")] = None,
    samples: Annotated[str | None, typer.Option(metavar="N | errors | 3,17", help=SAMPLES)] = None,
    target: Annotated[str | None, typer.Option(help="error, answer, right, a class (7), 7-3, or a target of the task.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Errors, or parts of a kind, that are named; 20 by default.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Of a training step; pruned, diff: of the pruning.")] = None,
    pruned: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Look at this pruned model only; repeatable.")] = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say what a part or sample gave, when, from what data, and what pruning changed; writes a page under RUN/explain.

    \b
    WHAT is one of these forms, with an example of each:
      errors                   prunekit explain RUN errors --split validation
      sample NUMBER            prunekit explain RUN sample 12
      layer [NAME]             prunekit explain RUN layer --samples errors
      channel GROUP [UNIT]     prunekit explain RUN channel conv3 5
      head ATTENTION [UNIT]    prunekit explain RUN head layers.0.attention
      weight PARAMETER [PLACE] prunekit explain RUN weight conv2.weight 7,3,1,1
      pruned NAME              prunekit explain RUN pruned small
      diff NAME [OTHER]        prunekit explain RUN diff small better
    Without NAME, UNIT or PLACE all layers, units or weights are ranked.
    """
    from prunekit.report.terminal.explaining import show_explanation
    from prunekit.verbs.explaining import explain_run
    from prunekit.verbs.pruned_folder import run_of

    output = Output(quiet, as_json)
    if not what and run.resolve().parent.name == "pruned":
        run, what, name = run_of(run), "pruned", run.resolve().name
    if not what:
        raise UsageError(
            f"explain {run}: of what? Give WHAT and NAME, or RUN/pruned/NAME alone; prunekit explain --help lists them"
        )
    chosen = _chosen(samples)
    opened = open_run(run, device)
    with output.working(run):
        result = explain_run(
            opened, what, name, index, split=split, samples=chosen, target=target, limit=limit, nodes=nodes, only=pruned
        )
    output.show(show_explanation, result)
    output.finish(result)


def _chosen(text: str | None) -> int | str | list[int] | None:
    """What ``--samples`` says: how many, ``errors``, or which (``3,`` is the one of that number)."""
    if text is None or text == "errors":
        return text
    if "," in text:
        return numbers(text.removesuffix(","), "--samples")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--samples is {text!r}; give how many at most (64), errors, or numbers (3,17; 3, for that one alone)")
    return int(text)
