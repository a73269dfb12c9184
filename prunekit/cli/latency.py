"""prunekit latency: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Device, Json, Quiet, numbers
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    after="eval",
    headings={"How it is timed": ("batch", "threads")},
    examples={
        "How fast the dense model is here": "prunekit latency runs/digits-cnn --batch 1,64",
        "A pruned one beside it": "prunekit latency runs/digits-cnn/pruned/small",
        "With one thread": "prunekit latency runs/digits-cnn/pruned/small --threads 1",
    },
)
def latency(
    path: Annotated[Path, typer.Argument(metavar="RUN|RUN/pruned/NAME", help="Run folder, or folder of a pruned model.")],
    batch: Annotated[str | None, typer.Option(metavar="1,64", help="Samples a pass; the recipe's eval.latency_batches.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Of torch; the recipe's by default.")] = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say how fast a model is on this machine.

    A run's dense model alone, or a pruned one beside it: medians with their intervals.
    """
    from prunekit.report.terminal.timing import show_timing
    from prunekit.verbs.timing import run_and_pruned, time_run

    output = Output(quiet, as_json)
    sizes = numbers(batch, "--batch")
    folder, pruned = run_and_pruned(path)
    opened = open_run(folder, device)
    with output.working():
        result = time_run(opened, pruned, sizes, threads)
    output.show(show_timing, result)
    output.finish(result)
