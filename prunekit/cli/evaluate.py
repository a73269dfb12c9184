"""prunekit eval: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Device, Json, Overwrite, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    name="eval",
    after="prune",
    examples={"What a pruned model lost, and how fast it is": "prunekit eval runs/digits-cnn/pruned/small"},
)
def eval_(
    pruned: Annotated[Path, typer.Argument(metavar="RUN/pruned/NAME", help="Folder of a pruned model.")],
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a pruned model on test data.

    Figures, sizes and speed beside the dense model's, and the model rebuilt from the training path.
    """
    from prunekit.report.terminal.evaluating import show_evaluation
    from prunekit.verbs.evaluating import evaluate
    from prunekit.verbs.pruned_folder import run_of

    output = Output(quiet, as_json)
    opened = open_run(run_of(pruned), device)
    with output.working(opened.path):
        record, reused = evaluate(opened, pruned, overwrite)
    output.show(show_evaluation, (pruned.resolve().name, record, reused))
    output.finish({**record.content(), "reused": reused})
