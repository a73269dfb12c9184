"""How long will it take: progress bars on stderr with counts, rate and time left, silent unless asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Self, TypeVar

from prunekit.errors import plain

if TYPE_CHECKING:  # rich takes as long to import as all else that the help needs, and only a bar needs it
    from rich.console import Console
    from rich.progress import Progress, Task

T = TypeVar("T")
_bars: ContextVar[Progress | None] = ContextVar("_bars", default=None)
NARROWEST, WIDEST = 4, 40
"""Columns of the bar itself."""
WITH_RATE = 60
"""Columns of a terminal that has room for the rate too."""


@contextmanager
def progress_bars(enabled: bool = True) -> Iterator[None]:
    """Shows a bar for every ``track`` inside; nothing is shown when stderr is not a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with bars_on(Console(stderr=True)) as bars:
        token = _bars.set(bars)
        try:
            yield
        finally:
            _bars.reset(token)


def bars_on(console: Console) -> Progress:
    """Bars of one line each, no wider than the terminal: the bar gives way first, then the description, never a figure."""
    from rich.progress import Progress, ProgressColumn
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    def width() -> int:
        return max(len(figures(task, console.width >= WITH_RATE)) for task in bars.tasks)

    class Described(ProgressColumn):
        def render(self, task: Task) -> Text:
            room = console.width - width() - NARROWEST - 3
            text = Text(task.description if room > 0 else "", no_wrap=True)
            text.truncate(max(room, 0), overflow="ellipsis")
            return text

    class Drawn(ProgressColumn):
        def render(self, task: Task) -> ProgressBar:
            described = max(Text(each.description).cell_len for each in bars.tasks)
            left = console.width - width() - described - 3
            return ProgressBar(task.total, task.completed, width=min(max(left, NARROWEST), WIDEST))

    class Figures(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(figures(task, console.width >= WITH_RATE), no_wrap=True)

    bars = Progress(Described(), Drawn(), Figures(), console=console, transient=True)
    return bars


def figures(task: Task, rate: bool) -> str:
    """``120/400  12.3/s  0:00:23 left``; what is not known yet is left out. Of stages ``3/7  0:01:12``."""
    total = "?" if task.total is None else f"{int(task.total):,}"
    told = [f"{int(task.completed):,}".rjust(len(total)) + f"/{total}"]
    if task.fields.get("stages"):  # no two take as long, so their number tells nothing about what is left
        return f"{told[0]}  {_clock(task.elapsed or 0)}"
    speed = task.finished_speed or task.speed
    if rate and speed:
        told.append(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")
    if task.time_remaining is not None:
        told.append(f"{_clock(task.time_remaining)} left")
    return "  ".join(told)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Bar:
    """One line of progress; ``advance`` is safe to call when no bars are shown."""

    def __init__(self, description: str, total: int, **fields: bool) -> None:
        self._bars = _bars.get()
        self._task = self._bars.add_task(plain(description), total=total, **fields) if self._bars else None

    def advance(self, amount: float = 1) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def describe(self, description: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=plain(description))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)


class Stages(Bar):
    """The bar over a whole command, above those of its stages: which it is at, of how many, and since when."""

    def __init__(self, command: str, total: int) -> None:
        super().__init__(command, total, stages=True)
        self._command = command

    def begin(self, stage: str) -> None:
        """The next stage begins."""
        self.advance()
        self.describe(f"{self._command}: {stage}")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterates ``items`` under a bar of ``total`` ticks."""
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()
