"""Progress bars: one line each that fits the terminal, with counts and time left; nothing where nobody looks."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from prunekit import progress
from prunekit.progress import Bar, Stages, bars_on, progress_bars, track

LONG = "rebuild the pruned model along the path that it was trained on (samples)"


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("width", [40, 60, 80, 140])
@pytest.mark.parametrize("tasks", [[("train", 400)], [(LONG, 1_000_000), ("auto (candidates)", 10)], [("刪" * 50, 9)]])
def test_every_line_fits_with_counts_and_time_left(width: int, tasks: list[tuple[str, int]]) -> None:
    clock, shown = Clock(), io.StringIO()
    bars = bars_on(Console(file=shown, force_terminal=True, width=width, color_system=None))
    bars.get_time = clock
    for name, total in tasks:
        bars.add_task(name, total=total)
    for _ in range(3):
        clock.now += 5
        for task in bars.tasks:
            bars.advance(task.id, task.total / 10)  # type: ignore[operator]
    console = Console(file=io.StringIO(), width=width)
    lines = ["".join(part.text for part in line) for line in console.render_lines(bars.get_renderable(), pad=False)]
    assert len(lines) == len(tasks)
    for line, (_, total) in zip(lines, tasks, strict=True):
        assert Console().measure(line.rstrip()).maximum <= width
        assert f"{int(total * 0.3):,}/{total:,}" in line
        assert "0:00:3" in line  # 3 tenths took 10 seconds between the first and the last
        assert line.rstrip().endswith(" left")


def test_nothing_is_written_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars():
        assert list(track(range(3), "reading", 3)) == [0, 1, 2]
        with Bar("trained", 2) as bar:
            bar.advance()
            bar.describe("almost")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_on_a_terminal_a_bar_is_shown_unless_quiet(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bars(enabled):
        list(track(range(3), "reading data", 3))
    assert ("reading data" in written.getvalue()) == enabled
    assert progress._bars.get() is None


@pytest.mark.parametrize("width", [40, 80])
def test_a_command_of_stages_shows_which_it_is_at_above_the_bars_of_that_stage(width: int) -> None:
    clock, console = Clock(), Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    bars = bars_on(console)
    bars.get_time = clock
    token = progress._bars.set(bars)
    try:
        with Stages("compress", 7) as stages:
            stages.begin("import")
            stages.begin("score")
            clock.now += 72
            with Bar(LONG, 400):
                shown = console.render_lines(bars.get_renderable(), pad=False)
    finally:
        progress._bars.reset(token)
    lines = ["".join(part.text for part in line).rstrip() for line in shown]
    assert len(lines) == 2
    assert all(Console().measure(line).maximum <= width for line in lines)
    assert lines[0].startswith("compress: score")
    assert lines[0].endswith("2/7  0:01:12")
