"""A run folder that may not be written is told of in one line, and what only reads still reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

WRITES = [
    ("score", "", "-c", "snip"),
    ("prune", "", "-c", "magnitude", "-s", "0.3", "--name", "new"),
    ("eval", "pruned/small", "--overwrite"),
    ("report", ""),
]


@pytest.fixture
def sealed(run: Path) -> Iterator[Path]:
    """The run, without a right to write anything in it."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield run
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.parametrize("asked", WRITES, ids=lambda asked: asked[0])
def test_what_cannot_be_written_is_one_line(sealed: Path, cli: Cli, asked: tuple[str, ...]) -> None:
    verb, place, *more = asked
    done = cli(verb, sealed / place, *more)
    assert (done.code, done.err.count("\n")) == (1, 1), done
    assert "could not be written (Permission denied)" in done.err


def test_info_reads_what_it_may_not_write(sealed: Path, cli: Cli) -> None:
    assert cli("info", sealed).code == 0
