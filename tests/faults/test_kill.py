"""A process may be killed at any moment: what stood stands, and the next call succeeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prunekit import ArtifactError, durable

VERBS = [
    ("train-overwrite", "score-overwrite", "eval", "import-overwrite", "report", "explain"),
    ("prune-finetune", "score", "dry-run", "export"),
    ("study", "compare", "prune-overwrite"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("verbs", VERBS, ids=lambda verbs: verbs[0])
def test_verbs_are_killed_at_every_operation(verbs: tuple[str, ...]) -> None:
    asked = [sys.executable, "-m", "tests.faults.kill", *verbs]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" times killed, 0 faults, ") == len(verbs)


def written(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("exchanges", [True, False], ids=["at once", "where folders cannot change places"])
@pytest.mark.parametrize("fails", range(1, 40))
def test_what_belongs_together_comes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, exchanges: bool) -> None:
    """A disk that fails at one operation leaves all old, or the next call makes all new."""
    if not exchanges:
        monkeypatch.setattr(durable, "_exchange", lambda first, second: False)
    place = written(tmp_path / "place", "table", "old")
    written(place / "inner", "file", "old")
    written(place / "taken", "file", "new")
    written(place, "gone", "old")
    count = 0

    def full(what: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == fails:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "on_operation", full)
    fault = ""
    try:
        with durable.together(place) as staged:
            (staged.folder / "table").write_text("new")
            staged.take("taken", "inner")
            staged.remove("gone")
    except ArtifactError as error:
        fault = str(error)
    assert ("No space left on device" in fault) == (count >= fails)
    standing = (place / durable.JOURNAL).exists()
    assert fault or not standing
    with durable.locked(place):
        told = {
            (place / "table").read_text(),
            (place / "inner" / "file").read_text(),
            "old" if (place / "gone").exists() else "new",
        }
    assert told == ({"old"} if fault and not standing else {"new"})
    assert {path.name for path in place.iterdir()} - {durable.LOCK} <= {"table", "inner", "taken", "gone"}


@pytest.mark.parametrize(
    "journal",
    [
        '{"moves": [["../x", "table", 1]], "remove": []}',
        '{"moves": [["table", "../x", 1]], "remove": []}',
        '{"moves": [["a/b/c", "table", 1]], "remove": []}',
        '{"moves": [["pruned/x", "table", 1]], "remove": []}',
        '{"moves": [], "remove": ["../x"]}',
        '{"moves": [], "remove": ["/etc/passwd"]}',
        '{"moves": {}, "remove": 3}',
        "[" * 100_000,
    ],
)
def test_a_strangers_journal_moves_nothing_outside(tmp_path: Path, journal: str) -> None:
    place = written(tmp_path / "run", durable.JOURNAL, journal)
    (tmp_path / "x").write_text("mine")
    written(place, "table", "old")
    with pytest.raises(ArtifactError, match=r"would (move|remove)|not a whole journal"), durable.locked(place):
        pass
    assert (tmp_path / "x").read_text() == "mine"
    assert (place / "table").read_text() == "old"


def test_a_strangers_link_is_no_temporary(tmp_path: Path) -> None:
    outside = written(tmp_path / "documents", "thesis", "mine")
    place = written(tmp_path / "run", durable.JOURNAL, '{"moves": [[".prunekit.a.tmp/thesis", "thesis", 1]], "remove": []}')
    (place / ".prunekit.a.tmp").symlink_to(outside)
    with pytest.raises(ArtifactError, match="is a link"), durable.locked(place):
        pass
    assert (outside / "thesis").read_text() == "mine"


def test_temporaries_of_the_living_stay(tmp_path: Path) -> None:
    (tmp_path / ".prunekit.dead.tmp").mkdir()
    with durable.replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        with durable.locked(tmp_path):
            assert not (tmp_path / ".prunekit.dead.tmp").exists()
            assert temporary.exists()
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    def refused(folder: Path) -> None:
        with durable.locked(folder):
            raise ArtifactError("no")

    with pytest.raises(ArtifactError, match="no"):
        refused(tmp_path / "one" / "two")
    assert not (tmp_path / "one").exists()
    kept = written(tmp_path / "one", "mine", "1")
    with pytest.raises(ArtifactError, match="no"):
        refused(kept)
    assert (kept / "mine").read_text() == "1"
    with durable.locked(kept):
        pass


def test_folders_change_places_at_once(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", "file", "1"), written(tmp_path / "two", "file", "2")
    if not durable._exchange(one, two):
        pytest.skip("this file system cannot exchange folders; prunekit renames them twice, and by a journal")
    assert [(path / "file").read_text() for path in (one, two)] == ["2", "1"]
