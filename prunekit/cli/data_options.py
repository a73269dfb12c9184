"""Options that say which data a model is scored and judged on: a factory's import path, or files and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.options import json_object
from prunekit.errors import UsageError

Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH|module:function", help="File or folder of data, a hub name, or a data factory."),
]
DataArgs = Annotated[
    str, typer.Option("--data-args", metavar="JSON", help="The factory's keyword arguments, or more keys of data in files.")
]
Text = Annotated[list[str] | None, typer.Option("--text", help="Column of the text; twice for pairs of texts.")]
Label = Annotated[list[str] | None, typer.Option("--label", help="Column of the label, or of the answer; repeatable.")]
Length = Annotated[int | None, typer.Option("--length", min=1, help="The most tokens of a text; those of a window.")]
Stride = Annotated[int | None, typer.Option("--stride", min=1, help="Tokens from window to window; the length by default.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave broken rows out and count them, instead of refusing them.")]
NAMES = ("data", "data_args", "text", "label", "length", "stride", "skip_bad")
"""The parameters of a verb that has them all, for its headings."""


def data_content(
    data: str | None,
    data_args: str = "{}",
    *,
    text: Sequence[str] | None = None,
    label: Sequence[str] | None = None,
    length: int | None = None,
    stride: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Any] | None:
    """A recipe's ``data`` section; None where no data are named.

    Raises:
        UsageError: options do not go with each other.
    """
    from prunekit.data.files.options import names_files, placed

    given = {
        **({"text": list(text)} if text else {}), **({"label": list(label)} if label else {}),
        **({} if length is None else {"length": length}), **({} if stride is None else {"stride": stride}),
        **({"skip_bad": True} if skip_bad else {}),
    }  # fmt: skip
    if data is None:
        if given or data_args != "{}":
            option = "data-args" if not given else next(iter(given)).replace("_", "-")
            raise UsageError(f"--{option} without --data")
        return None
    more = json_object(data_args, "--data-args")
    if not names_files(data):
        if given:
            raise UsageError(f"--{next(iter(given)).replace('_', '-')} goes with data in files; {data} is a factory")
        return {"factory": data, "args": more}
    if twice := sorted({"files", "factory", "args", *given} & more.keys()):
        raise UsageError(f"--data-args has {twice[0]}, which has an option of its own")
    return {"files": placed(data, Path()), **more, **given}
