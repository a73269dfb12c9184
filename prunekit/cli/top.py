"""The command line's top: what it is called, and its version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prunekit.cli.panels import unset_flags, write_examples
from prunekit.version import __version__


class Top(TyperGroup):
    """The verbs, and what one does with several of them."""

    examples: Mapping[str, str] = {
        "All that a recipe says, from training to a report": "prunekit run recipes/digits-cnn.yaml --out runs/digits-cnn",
        "A model three times as fast": "prunekit prune runs/digits-cnn --speedup 3 --structure channels --name fast",
        "Why is an answer wrong": "prunekit explain runs/digits-cnn errors",
        "What a verb takes, with examples": "prunekit prune --help",
    }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        unset_flags(self, ctx)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_examples(formatter, self.examples)


app = typer.Typer(
    cls=Top,
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
