"""One cell of the table: what a step of prunekit did to a model, works, refused or fault, and how that is told apart."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import prunekit
from prunekit.errors import PrunekitError

WORKS, REFUSED, FAULT = "works", "refused", "fault"
# What Python and its libraries say when something broke; a refusal is said in prunekit's own words.
RAW = re.compile(
    r"\b(?!(?:Usage|Artifact|Structure|NonFinite|Prunekit)Error)[A-Z]\w*(?:Error|Exception)\b|Traceback|\bat \w+\.py:\d+"
)
PACKAGE = Path(prunekit.__file__).parent


@dataclass(frozen=True)
class Cell:
    """``verdict``: one of the three; ``why``: the refusal's line, or the exception of a fault; ``where``: file:line of it."""

    verdict: str
    why: str = ""
    where: str = ""
    seconds: float = 0.0


class Wrong(Exception):
    """A step ended as if all was well, and what it left is wrong; says what."""


def judged(step: Callable[[], str]) -> Cell:
    """Runs a step, which returns what is worth saying when it worked."""
    try:
        return Cell(WORKS, step())
    except PrunekitError as error:
        text = str(error)
        if "\n" in text.strip() or RAW.search(text):
            return Cell(FAULT, f"raw words in a refusal: {' '.join(text.split())}", _place(error))
        return Cell(REFUSED, text, _place(error))
    except Wrong as wrong:
        return Cell(FAULT, f"wrong: {wrong}")
    except Exception as error:  # whatever else a step raises is what this table is there to find
        return Cell(FAULT, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", _place(error))


def command(*arguments: object) -> str:
    """Runs the command line in this process; what it printed.

    Raises:
        Exception: whatever stopped it, before it became a line on stderr.
    """
    from prunekit.cli import main

    printed = io.StringIO()
    argv = ["prunekit", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"PRUNEKIT_DEBUG": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            main()
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise Wrong(f"exit {stop.code}: {' '.join(printed.getvalue().split())[-300:]}") from None
    return printed.getvalue()


def _place(error: BaseException) -> str:
    """``file:line`` in prunekit where it was raised, and in the library below where it came from there."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if PACKAGE in Path(f.filename).parents]
    last = frames[-1] if frames else None
    parts = [f"{Path(f.filename).relative_to(PACKAGE.parent)}:{f.lineno}" for f in ours[-1:]]
    if last is not None and last not in ours[-1:]:
        parts.append(f"{Path(last.filename).name}:{last.lineno}")
    return " < ".join(parts)
