"""SIGINT and SIGTERM end the program with one line and exit code 130 or 143; workers end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunekit import durable
from prunekit.errors import ArtifactError
from prunekit.recipe import Recipe, Study
from prunekit.verbs.study_cells import Job
from prunekit.verbs.study_folder import StudyFolder
from prunekit.verbs.studying import study_run
from tests.cli.conftest import RECIPE, Cli

TOLD = {signal.SIGINT: ("prunekit: interrupted\n", 130), signal.SIGTERM: ("prunekit: terminated\n", 143)}


def start(*arguments: str) -> subprocess.Popen[str]:
    """A Python that hears both signals, whatever the shell that runs the tests ignores."""
    heard = lambda: [signal.signal(signum, signal.SIG_DFL) for signum in TOLD]  # noqa: E731
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "seconds"), [(signal.SIGINT, 0.5), (signal.SIGTERM, 0.2)])
def test_a_signal_while_libraries_are_imported(signum: signal.Signals, seconds: float) -> None:
    process = start("-m", "prunekit", "info", "nowhere")
    time.sleep(seconds)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) in (TOLD[signum], ("prunekit: nowhere: no such file or folder\n", 1))  # a fast machine


SCENES = {
    "at work": "with stopping.raised(): come()",
    "in code from a text": "with stopping.raised(): exec('come()')",
    "during an import": "import comes",
    "twice": "with stopping.raised():\n    try: come()\n    finally: come()",
    "in a destructor": "class It:\n    def __del__(self): come()\nwith stopping.raised():\n    it = It()\n    del it",
    "while an error of it is told": "with stopping.raised():\n    try: come()\n    except BaseException: raise ValueError('raw')",
    "after work": "pass\ncome()",
    "in an exit function": "import atexit\natexit.register(come)",
}


@pytest.mark.parametrize("signum", TOLD)
def test_one_line_wherever_it_comes(signum: signal.Signals, tmp_path: Path) -> None:
    """Every scene in a process of its own, all at the same time."""
    (tmp_path / "comes.py").write_text(f"import signal\nsignal.raise_signal({int(signum)})\n")
    running = {}
    for name, scene in SCENES.items():
        inside = "\n    ".join(scene.split("\n"))
        program = (
            f"import signal, sys\nfrom prunekit import stopping\nsys.path.append({str(tmp_path)!r})\n"
            f"def come(): signal.raise_signal({int(signum)})\nstopping.listen()\n"
            f"try:\n    {inside}\nexcept (KeyboardInterrupt, stopping.Terminated, Exception) as error:\n"
            "    line, code = stopping.told(error)\n    come()\n    stopping.say(line)\n    sys.exit(code)\n"
        )
        running[name] = start("-c", program)
    for name, process in running.items():
        _, err = process.communicate(timeout=60)
        assert (err, process.returncode) == TOLD[signum], name


def test_of_several_ranks_the_first_one_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they meet; torchrun ends the others by SIGTERM when one has failed, which that one has told."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("0", "prunekit: terminated\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        process = start("-c", "import signal\nfrom prunekit import stopping\nstopping.listen()\nsignal.raise_signal(15)")
        assert (process.communicate(timeout=60)[1], process.returncode) == (expected, 143)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(
        "import multiprocessing, os, time\nfrom prunekit import stopping\n"
        "def child(told):\n    stopping.end_with_parent()\n    told.put(os.getpid())\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    context = multiprocessing.get_context('spawn')\n    told = context.Queue()\n"
        "    context.Process(target=child, args=(told,)).start()\n    print(told.get(), flush=True)\n    time.sleep(60)\n"
    )
    process = start(str(tmp_path / "family.py"))
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and alive(worker):
        time.sleep(0.02)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (OSError, IndexError):
        return Path("/proc").is_dir() is False and os.kill(pid, 0) is None
    return state != "Z"


def test_cells_in_work_are_locked(tmp_path: Path) -> None:
    study = Study.of({"cases": {"a": "a.yaml"}, "criteria": ["magnitude"], "structures": {"unstructured": [0.5]}}, "study")
    (tmp_path / "a.yaml").write_text(RECIPE)
    job = Job("a", 0, tmp_path / "run", tmp_path / "cells", study, Recipe.load(tmp_path / "a.yaml"))
    for folder in (job.cells, job.run):
        with durable.locked(folder), pytest.raises(ArtifactError, match="another prunekit is writing here"):
            study_run(study, [job], StudyFolder(tmp_path))
    assert not (job.run / "trajectory.partial").exists()


def test_ctrl_c_at_a_question_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.verbs import info

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "info", interrupted)
    assert cli("info", "x") == (130, "", "prunekit: interrupted\n")
