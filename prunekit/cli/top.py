"""The command line's top: what it is called, and its version."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.version import __version__

app = typer.Typer(
    name="prunekit",
    help="Make a trained model smaller, and see why each weight stayed or went.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"prunekit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
