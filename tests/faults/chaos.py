"""Kills workers and the coordinator of a study, and ranks of the verbs that share, at random moments, all in one run.

``python -m tests.faults.chaos`` kills twenty times, ``--kills N`` as often as that, each kind a quarter of it at least. A study
goes on meanwhile, on workers of Dask, every third start on a pool of processes; one that is through is looked at, and the next
begins. What must hold:

- a study whose worker was killed goes on, and says nothing of it;
- where its coordinator was killed its workers end too, what it has written proves itself, and the same command goes on from
  there: what was finished is neither trained, scored nor measured again;
- in the end it is what an undisturbed study in one process is, every figure to the bit, with no file more, there or among
  temporary ones;
- of ranks, what ``tests.faults.kill_ranks`` says.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.bench import Bench
from tests.faults.kill import differences, whole
from tests.faults.kill_ranks import Shared
from tests.faults.small import RECIPE, content

STUDY = """
cases: {one: recipe.yaml}
seeds: [0, 1]
criteria: [magnitude, influence, random]
samples: 8
structures: {unstructured: [0.5, 0.8], channels: [0.5]}
allocations: {unstructured: [global], channels: [global]}
control: false
leading: 1
always: [magnitude]
tune: {epochs: 1, sparsities: {unstructured: [0.5]}}
refine: {of: {unstructured: [magnitude]}, tune: [refined]}
"""
DASK, POOL = ("--executor", "dask-local:2"), ("--jobs", "2")
KINDS = ("worker", "coordinator", "rank")
RANKS = ("score", "refine", "finetune")
"""Verbs of ``tests.faults.kill_ranks`` that need nothing but a run."""
FINISHED = ("cells/*/*/*.json", "runs/*/train.json", "runs/*/trajectory/*.json", "runs/*/scores/*.safetensors")
"""What a study has once and for all."""
GIVES_UP = 4
"""So many workers killed in one start may have been at the same cell, which the study then names, and ends."""
START = 3.0
"""Times as long as one process is at work workers are, about, since they have to start."""
ENDS = 20.0
"""Seconds in which workers end after their coordinator was killed."""


class Study:
    """A study in ``folder``, whoever is killed.

    Attributes:
        way: what does its work, as it was last started.
        faults: what was wrong, as far as nobody took it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.faults = folder, folder / "out", list[str]()
        self._temporary, self._said = folder / "temporary", folder / "said"
        self._temporary.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "study.yaml").write_text(STUDY)
        self._process: psutil.Popen | None = None
        path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self._environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self._temporary)}
        self._killed, self._finished = 0, dict[str, int]()
        self.way = ""

    def start(self, *way: str) -> None:
        """Starts the command, until it is at work."""
        token = self.out / ".prunekit.study"
        before = token.read_text() if token.exists() else None
        verb = ["compare", str(self.folder / "study.yaml"), "--out", str(self.out), *way, "-q"]
        with self._said.open("w") as said:
            self._process = psutil.Popen(
                [sys.executable, "-m", "prunekit", *verb], stdout=said, stderr=subprocess.STDOUT, env=self._environment
            )
        self._killed, self.way = 0, " ".join(way)
        while self.at_work and (not token.exists() or token.read_text() in ("", before)):
            time.sleep(0.01)

    @property
    def at_work(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def through(self) -> bool:
        """Whether it is through, once it has ended; else it is to be started again."""
        if self._process is None:
            return False
        code, said = self._process.wait(600), self._said.read_text()
        self._process = None
        if code == 1 and self._killed >= GIVES_UP and "every worker that took it was killed" in said:
            return False
        if code != 0 or said:
            self.faults.append(f"the study ends with {code} and says: {said}")
        return True

    def kill_worker(self, draw: random.Random) -> bool:
        """Kills one of its workers, waiting for one where all are being started; False where the study ends before."""
        while self.at_work:
            workers = [child for child in self._children() if "--multiprocessing-fork" in _command(child)]
            with suppress(IndexError, psutil.NoSuchProcess):
                draw.choice(workers).kill()
                self._killed += 1
                return True
            time.sleep(0.01)
        return False

    def kill_coordinator(self) -> bool:
        """Kills the command itself, and looks at what is left; False where it has ended before."""
        if self._process is None or not self.at_work:
            return False
        self._process.suspend()  # so that it starts none whom nobody knows
        children = self._children()
        self._process.kill()
        self._process.wait()
        self._process = None
        _, alive = psutil.wait_procs(children, ENDS)
        for child in alive:
            self.faults.append(f"{_command(child)} lives on {ENDS:g} s after its coordinator was killed")
            child.kill()
        self.faults += whole(self.out, set(self._finished))
        self._look()
        return True

    def check(self, expected: dict[str, str]) -> list[str]:
        """Everything that was wrong with a study that is through."""
        self._look()
        left = [path for path in self._temporary.iterdir() if not path.name.startswith("torchinductor_")]  # torch's cache
        found = self.faults + differences(self.out, expected) + [f"{path} is left behind" for path in left]
        shutil.rmtree(self.folder)
        return found

    def _children(self) -> list[psutil.Process]:
        try:
            return [] if self._process is None else self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _look(self) -> None:
        """Notes what is finished; what was before must not have been written again."""
        for pattern in FINISHED:
            for path in self.out.glob(pattern):
                name, written = str(path.relative_to(self.out)), path.stat().st_mtime_ns
                if self._finished.setdefault(name, written) != written:
                    self.faults.append(f"{name} was finished, and was made again")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


class Chaos:
    """Kills at moments that ``draw`` decides, and tells ``say`` of each.

    Attributes:
        faults: what was wrong.
        hits: kills by kind.
        starts: of studies.
        through: studies that came to their end.
    """

    def __init__(self, folder: Path, draw: random.Random, say: Callable[[str], None]) -> None:
        self.faults, self.hits, self.starts, self.through = list[str](), Counter[str](), 0, 0
        self._folder, self._draw, self._say = folder, draw, say
        self._bench, self._shared = Bench(folder), dict[str, Shared]()
        self._study: Study | None = None
        undisturbed = Study(folder / "undisturbed")
        undisturbed.start()
        begun = time.perf_counter()
        undisturbed.through()
        seconds, self._expected = time.perf_counter() - begun, content(undisturbed.out)
        self._longest = seconds * START
        self.faults += undisturbed.check(self._expected)
        say(f"an undisturbed study: {len(self._expected)} files, {seconds:.1f} s at work")

    def kill(self, kind: str) -> None:
        """Kills one of a kind; where the moment that was drawn hits nobody, another is drawn."""
        before, begun = len(self.faults), time.perf_counter()
        where = self._kill_rank() if kind == "rank" else self._kill_in_study(kind)
        self.hits[kind] += 1
        found = "; ".join(self.faults[before:]) or "sound"
        self._say(f"{self.hits.total():3} {where}: {found} ({time.perf_counter() - begun:.1f} s)")

    def _kill_rank(self) -> str:
        name = self._draw.choice(RANKS)
        if name not in self._shared:
            self._shared[name] = Shared(self._bench, name)
            self.faults += self._shared[name].faults
        where, found = self._shared[name].killed(self._draw)
        self.faults += found
        return where

    def _kill_in_study(self, kind: str) -> str:
        while True:
            study, moment = self._at_work(), self._draw.uniform(0.0, self._longest)
            end = time.monotonic() + moment
            while study.at_work and time.monotonic() < end:
                time.sleep(0.01)
            if study.kill_worker(self._draw) if kind == "worker" else study.kill_coordinator():
                found, study.faults = study.faults, []
                self.faults += found
                return f"{study.folder.name}, start {self.starts} ({study.way}): {kind} killed {moment:.3f} s later"

    def _at_work(self) -> Study:
        """The study that is under way, or the next."""
        if self._study is not None and self._study.ended:
            self.end()
        if self._study is None:
            self._study = Study(self._folder / f"study {self.through + 1}")
        if not self._study.at_work:
            self._start(self._study)
        return self._study

    def _start(self, study: Study) -> None:
        self.starts += 1
        study.start(*DASK if self.starts % 3 else POOL)

    def end(self) -> None:
        """Lets the study that is under way come to its end, and looks at it."""
        if self._study is None:
            return
        while not self._study.through():
            self._start(self._study)
        self.faults += self._study.check(self._expected)
        self._study = None
        self.through += 1


def run(folder: Path, kills: int, seed: int, say: Callable[[str], None] = lambda line: None) -> Chaos:
    """Kills so often in all, each kind a quarter of it at least, but once."""
    draw = random.Random(seed)
    kinds = list(KINDS) * max(kills // 4, 1)
    kinds += draw.choices(KINDS, k=kills - len(kinds))
    draw.shuffle(kinds)
    chaos = Chaos(folder, draw, say)
    for kind in kinds:
        chaos.kill(kind)
    chaos.end()
    return chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help=f"in all, {len(KINDS)} at least")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.kills < len(KINDS):
        parser.error(f"--kills is {asked.kills}; it must be {len(KINDS)} or more")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder), asked.kills, asked.seed, lambda line: print(line, flush=True))
    for fault in done.faults:
        print(f"  {fault}")
    told = ", ".join(f"{done.hits[kind]} {kind}s" for kind in KINDS)
    print(
        f"{done.hits.total()} killed ({told}); {done.through} studies came to their end in {done.starts} starts; "
        f"{len(done.faults)} faults, {time.perf_counter() - begun:.1f} s"
    )
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())
