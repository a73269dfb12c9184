"""prunekit report: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Json, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    after="explain",
    examples={
        "One page of all that a run holds": "prunekit report runs/digits-cnn",
        "Several runs side by side": "prunekit report runs/one runs/two --out runs/both.html",
    },
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="A run; with --out several.")],
    out: Annotated[Path | None, typer.Option("--out", help="Page to write, PAGE.html; of one run RUN/report.html.")] = None,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Draw what a run holds by now, or several side by side."""
    from prunekit.imports import no_code, use_working_folder
    from prunekit.verbs.reporting import report_runs

    output = Output(quiet, as_json)
    opened = [open_run(run, "cpu", code=False) for run in runs]  # nothing is computed, so the recipe's device need not be here
    use_working_folder(*runs)
    with output.working(runs[0] if out is None and len(runs) == 1 else None), no_code("report"):
        page, left_out, missing = report_runs(opened, out)
    output.show(show_report, (page, left_out, missing))
    output.finish({"path": str(page), "left_out": left_out, "missing": missing})


def show_report(result: tuple[Path, list[str], list[str]]) -> None:
    path, left_out, missing = result
    for line in left_out:
        print(f"report: left out: {line}")
    for line in missing:
        print(f"report: {line}")
    print(f"report: {path}")
