"""Temporary folders go with their process, however it ends; of one that was killed with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENDS = {
    "normally": "",
    "by an error": "raise ValueError('raw')",
    "by a signal at work": "with stopping.raised(): signal.raise_signal(signal.SIGTERM)",
    "by a signal elsewhere": "signal.raise_signal(signal.SIGTERM)",
    "by its parent's end": "stopping.end_with_parent()\nimport time\ntime.sleep(60)",
    "as a process of a pool": "import multiprocessing\nchild = multiprocessing.get_context('fork').Process("
    "target=temporary.folder)\nchild.start()\nchild.join()",
}


def start(temporary: Path, end: str) -> subprocess.Popen[str]:
    temporary.mkdir(exist_ok=True)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom prunekit import stopping, temporary\nstopping.listen()\n"
        f"place = temporary.folder()\nPath(place.name, 'notes').touch()\nprint(flush=True)\n{end}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip


def test_it_goes_with_its_process(tmp_path: Path) -> None:
    """Every end in a process of its own, all at the same time."""
    for process in [start(tmp_path / name, end) for name, end in ENDS.items()]:
        process.communicate(timeout=60)
    assert {name: list((tmp_path / name).iterdir()) for name in ENDS} == {name: [] for name in ENDS}


def test_of_a_killed_one_it_goes_with_the_next_and_of_a_living_one_it_stays(tmp_path: Path) -> None:
    mine = [tmp_path / "prunekit-spool-1", tmp_path / "prunekit-mine.txt"]
    mine[0].mkdir()
    mine[1].touch()
    living = start(tmp_path, "sys.stdin.read()")
    assert living.stdout is not None
    living.stdout.readline()
    killed = start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".tmp"]) == 2
    start(tmp_path, "").communicate(timeout=60)
    (left,) = (path for path in tmp_path.iterdir() if path.suffix == ".tmp")
    assert len(list(left.glob("*/notes"))) == 1
    living.communicate(timeout=60)
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_a_link_is_nobodys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit import temporary

    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter").touch()
    (tmp_path / "prunekit-abc.tmp").symlink_to(thesis)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary.folder() as place:
        assert Path(place).parent.parent == tmp_path
    assert (thesis / "chapter").exists()
