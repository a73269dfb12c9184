"""prunekit report: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path

from prunekit.cli.opening import open_run
from prunekit.cli.options import Json, Quiet, RunFolder
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(after="explain", examples={"One page of all that a run holds": "prunekit report runs/digits-cnn"})
def report(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Write RUN/report.html from what the run holds by now."""
    from prunekit.imports import no_code
    from prunekit.verbs.reporting import report_run

    output = Output(quiet, as_json)
    opened = open_run(run, "cpu", code=False)  # nothing is computed, so the recipe's device need not be here
    with output.working(run), no_code("report"):
        page, left_out, missing = report_run(opened)
    output.show(show_report, (page, left_out, missing))
    output.finish({"path": str(page), "left_out": left_out, "missing": missing})


def show_report(result: tuple[Path, list[str], list[str]]) -> None:
    path, left_out, missing = result
    for line in left_out:
        print(f"report: left out: {line}")
    for line in missing:
        print(f"report: {line}")
    print(f"report: {path}")
