"""prunekit trust: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.options import Json, Quiet, RunFolder
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError, plain


@verb(
    after="info",
    headings={"Answer": ("yes",)},
    examples={"Let a run from somebody else import its code": "prunekit trust runs/from-a-colleague"},
)
def trust(
    run: RunFolder,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what a run folder's recipe would import, and let it."""
    import sys

    from prunekit import trust as trusting
    from prunekit.imports import use_working_folder
    from prunekit.recipe import read_yaml

    output = Output(quiet, as_json)
    use_working_folder(run)
    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"{run}: not a run folder (no recipe.yaml)")
    recipe = read_yaml(run / "recipe.yaml")
    named = trusting.imports_of(recipe)
    output.show(show_trust, (run, named))
    if named and not yes:
        if not sys.stdin.isatty():
            raise UsageError("trust asks before it lets code run; nobody can answer here, so look at it and give --yes")
        typer.confirm("Let it run?", abort=True, err=True)
    if why := trusting.remember(run, recipe):
        raise UsageError(f"cannot be kept: {why}")
    output.finish({"path": str(run), "imports": [vars(one) for one in named]})


def show_trust(result: tuple[Path, list[Any]]) -> None:
    run, named = result
    if not named:
        print(f"trust: {run}: its recipe names nothing that would have to be trusted")
    for one in named:
        print(f"trust: {plain(one.key)}: {plain(one.path)}, from {plain(one.file)}")
