"""Kills one of two ranks at random moments after they have met, in the verbs that they share, and looks at what is left.

``python -m tests.faults.kill_ranks`` kills ten times in each verb, ``--times N`` as often as that. What must hold each time:

- the other rank ends too, within seconds and with one line, and never with another's traceback;
- whatever stood before stands, old or new, and proves itself;
- the same command, started again with two ranks, succeeds, and leaves what an undisturbed one leaves, and nothing else.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.kill import differences, whole
from tests.faults.small import content
from tests.ranks_of import CLI, Done, Ranks

MANY = 2
VERBS: dict[str, tuple[str, ...]] = {
    "score": ("score", "RUN", "-c", "influence", "-c", "snip", "--overwrite"),
    "refine": ("prune", "RUN", "-c", "magnitude", "-s", "0.3", "--refine", "--name", "loose", "--overwrite"),
    "finetune": ("prune", "RUN", "-c", "magnitude", "-s", "0.3", "--finetune", "2", "--name", "loose", "--overwrite"),
    "compress": ("compress", "MODEL", "--data", "tests.faults.small:words", "-s", "0.5", "-c", "magnitude", "--no-refine",
                 "--out", "NEW"),
}  # fmt: skip
"""Name -> arguments, as in ``tests.faults.kill``."""


class Shared:
    """A verb that two ranks share, on a bench's finished run, and what it leaves where nobody disturbs it.

    Attributes:
        faults: what was wrong with that.
    """

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        place = bench.copy("whole")
        ranks = self._started(place)
        ranks.meet()
        begun = time.perf_counter()
        self.faults = [f"{name}, undisturbed: exit code {done.code}: {done.err}" for done in ranks.done() if done.code]
        self._seconds, self._expected = time.perf_counter() - begun, content(place)
        run = bench.base / "run"
        self._before = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    def _started(self, place: Path) -> Ranks:
        return Ranks(MANY, CLI, *self.bench.arguments(place, VERBS[self.name]))

    def killed(self, draw: random.Random) -> tuple[str, list[str]]:
        """Kills a rank at work on a fresh copy, and starts the verb again; returns which, and what was wrong.

        Where the rank has ended by the moment that was drawn, both are drawn again.
        """
        while True:
            place, moment, victim = self.bench.copy("disturbed"), draw.uniform(0.0, self._seconds), draw.randrange(MANY)
            ranks = self._started(place)
            ranks.meet()
            time.sleep(moment)
            ranks.processes[victim].kill()
            done = ranks.done(60)
            if done[victim].code == -signal.SIGKILL:
                break
        where = f"{self.name}, rank {victim} killed after {moment:.3f} s"
        faults = faults_of(done[1 - victim], where)
        faults += [f"{where}: {fault}" for fault in whole(place / "run", self._before)]
        for again in self._started(place).done():
            faults += [f"{where}: the next call ends with {again.code}: {again.err}"] if again.code else []
        return where, faults + [f"{where}: {fault}" for fault in differences(place, self._expected)]


def faults_of(done: Done, who: str) -> list[str]:
    """What is wrong with how the rank that was not killed has ended."""
    lines = [line for line in done.err.splitlines() if line.startswith("prunekit: ")]
    if done.code not in (0, 1) or "Traceback" in done.err or len(lines) != done.code:
        return [f"{who}: the other ends with {done.code}: {done.err}"]
    return []


def check(bench: Bench, name: str, times: int, draw: random.Random) -> list[str]:
    """Kills in one verb; returns what was wrong."""
    verb = Shared(bench, name)
    return verb.faults or [fault for _ in range(times) for fault in verb.killed(draw)[1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", help=f"of {', '.join(VERBS)}; all of them by default")
    parser.add_argument("--times", type=int, default=10, help="kills in each verb")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), pretrained="compress" in (asked.verbs or VERBS))
        for name in asked.verbs or VERBS:
            begun = time.perf_counter()
            faults = check(bench, name, asked.times, random.Random(f"{asked.seed} {name}"))
            print(f"{name}: {asked.times} ranks killed, {len(faults)} faults, {time.perf_counter() - begun:.1f} s", flush=True)
            for fault in faults:
                print(f"  {fault}", flush=True)
            bad += len(faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
