"""Where a verb's result goes."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, TypeVar

from prunekit import ranks
from prunekit.errors import Note, visible
from prunekit.progress import progress_bars

Shown = TypeVar("Shown")


class Visible(io.TextIOBase):
    """A stream whose text may come from files: what a terminal would obey is written out, as in ``\\x1b[31m``."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def write(self, text: str) -> int:
        self.stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


class Output:
    """Where a verb's result goes: tables for people, JSON for programs, nothing when quiet.

    While a verb works, whatever the user's own code prints goes to stderr (nowhere when quiet), so that stdout holds
    the result alone.
    """

    def __init__(self, quiet: bool, as_json: bool) -> None:
        quiet = quiet or not ranks.first()
        self.quiet, self.as_json, self.stdout = quiet, as_json and ranks.first(), sys.stdout
        if quiet:
            warnings.simplefilter("ignore", Note)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(visible(text), file=sys.stderr, flush=True)

    def show(self, prints: Callable[[Shown], None], result: Shown) -> None:
        """Calls ``prints`` with the result, unless nobody is to read it."""
        if not self.quiet and not self.as_json:
            with redirect_stdout(Visible(self.stdout)):
                prints(result)

    def alone(self, text: str) -> None:
        """Writes a text that was asked for and nothing beside it, so that it can be piped; quiet or not."""
        if ranks.first():
            Visible(self.stdout).write(text)

    def finish(self, result: Any) -> None:
        if self.as_json:
            print(json.dumps(result, indent=2), file=self.stdout)

    @contextmanager
    def working(self, run: Path | None = None) -> Iterator[None]:
        """Progress bars on; ``run`` is written by nobody else meanwhile."""
        from prunekit.durable import locked

        with ExitStack() as stack:
            if run is not None:
                stack.enter_context(locked(run))
            elsewhere = stack.enter_context(open(os.devnull, "w")) if self.quiet else sys.stderr
            stack.enter_context(redirect_stdout(elsewhere))
            stack.enter_context(progress_bars(not self.quiet))
            yield
