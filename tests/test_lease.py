"""A place on a store is one process's: a live one keeps it, a dead one's is taken, and who loses it is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from prunekit import lease
from prunekit.errors import ArtifactError
from prunekit.lease import Lease
from prunekit.remote import Remote
from tests.stores import LateStore


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(lease, "BEAT", 0.05)
    return Remote(f"late://{tmp_path}/store")


def test_a_live_one_keeps_it_and_leaves_nothing(remote: Remote, tmp_path: Path) -> None:
    with Lease(remote, tmp_path / "mine") as mine:
        with pytest.raises(ArtifactError, match="is at work there; wait for it"), Lease(remote, tmp_path / "theirs"):
            pass
        mine.check()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with Lease(remote, tmp_path / "theirs") as theirs:
        theirs.check()


def test_a_dead_ones_is_taken_and_one_of_this_machine_at_once(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_live", lambda self: None)  # as of a process that was killed
    dead = Lease(remote, tmp_path / "mine").__enter__()
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with Lease(remote, tmp_path / "mine") as again:
        assert waited.count(lease.BEAT) == 0
        with Lease(remote, tmp_path / "theirs") as theirs:
            assert waited.count(lease.BEAT) == lease.BEATS
            theirs.check()
            for lost in (dead, again):
                with pytest.raises(ArtifactError, match="has gone on there; this one ends"):
                    lost.check()


@pytest.mark.parametrize("text", ["", "junk", "\x1b[31m \x00 \x1b[2J 1", "x" * 5000])
def test_whatever_lies_there_is_no_word_of_ours(text: str, remote: Remote, tmp_path: Path) -> None:
    Path(tmp_path / "store").mkdir()
    (tmp_path / "store" / lease.NAME).write_text(text)
    with Lease(remote, tmp_path / "mine") as mine:
        mine.check()


def test_a_store_that_is_away_for_a_while_costs_nothing(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(remote, tmp_path / "mine") as mine:
        monkeypatch.setattr(LateStore, "broken", {lease.NAME})
        time.sleep(3 * lease.BEAT)
        with pytest.raises(ArtifactError, match="could not be read"):
            mine.check()
        monkeypatch.setattr(LateStore, "broken", set())
        mine.check()
    assert not (tmp_path / "store" / lease.NAME).exists()
