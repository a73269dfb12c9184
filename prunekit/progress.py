"""How long will it take: progress bars on stderr with rate and time left, silent unless asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from prunekit.errors import plain

T = TypeVar("T")
_bars: ContextVar[Progress | None] = ContextVar("_bars", default=None)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def progress_bars(enabled: bool = True) -> Iterator[None]:
    """Shows a bar for every ``track`` inside; nothing is shown when stderr is not a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        token = _bars.set(bars)
        try:
            yield
        finally:
            _bars.reset(token)


class Bar:
    """One line of progress; ``advance`` is safe to call when no bars are shown."""

    def __init__(self, description: str, total: int) -> None:
        self._bars = _bars.get()
        self._task = self._bars.add_task(plain(description), total=total) if self._bars else None

    def advance(self, amount: float = 1) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def describe(self, description: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=plain(description))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterates ``items`` under a bar of ``total`` ticks."""
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()
