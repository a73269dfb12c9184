"""prunekit explain: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Device, Json, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError


@verb(
    after="sensitivity",
    example="prunekit explain runs/digits-cnn channel conv2 7; prunekit explain runs/digits-cnn diff channels; "
    "prunekit explain runs/digits-cnn/pruned/unstructured",
)
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN | RUN/pruned/NAME", help="A run, or a pruned model and nothing more.")],
    what: Annotated[str, typer.Argument(metavar="WHAT", help="weight, channel, head, layer, sample, pruned or diff.")] = "",
    name: Annotated[str, typer.Argument(metavar="NAME", help="A parameter, group or layer; a sample; a pruned model.")] = "",
    index: Annotated[str, typer.Argument(metavar="[INDEX]", help="Of a weight, channel or head; diff: another model.")] = "",
    split: Annotated[str | None, typer.Option(help="test, validation, scoring; train for a training sample.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many at most; eval.samples by default.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Of a training step; pruned, diff: of the pruning.")] = None,
    pruned: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Look at this pruned model only; repeatable.")] = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say what a part or sample gave, when, from what data, and what pruning changed; writes a page under RUN/explain."""
    from prunekit.report.terminal.explaining import show_explanation
    from prunekit.verbs.explaining import explain_run
    from prunekit.verbs.pruned_folder import run_of

    output = Output(quiet, as_json)
    if not what and run.resolve().parent.name == "pruned":
        run, what, name = run_of(run), "pruned", run.resolve().name
    if not name:
        raise UsageError(f"explain {run} {what}".rstrip() + ": of what? Give WHAT and NAME, or RUN/pruned/NAME alone")
    opened = open_run(run, device)
    with output.working(run):
        result = explain_run(opened, what, name, index, split=split, samples=samples, nodes=nodes, only=pruned)
    output.show(show_explanation, result)
    output.finish(result)
