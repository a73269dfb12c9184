"""Kills one of two ranks at random moments after they have met, in the verbs that they share, and looks at what is left.

``python -m tests.faults.kill_ranks`` kills ten times in each verb, ``--times N`` as often as that. What must hold each time:

- the other rank ends too, within seconds and with one line, and never with another's traceback;
- whatever stood before stands, old or new, and proves itself;
- the same command, started again with two ranks, succeeds, and leaves what an undisturbed one leaves, and nothing else.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.kill import left, whole
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


def started(bench: Bench, place: Path, name: str) -> Ranks:
    return Ranks(MANY, CLI, *bench.arguments(place, VERBS[name]))


def faults_of(done: Done, who: str) -> list[str]:
    """What is wrong with how the rank that was not killed has ended."""
    lines = [line for line in done.err.splitlines() if line.startswith("prunekit: ")]
    if done.code not in (0, 1) or "Traceback" in done.err or len(lines) != done.code:
        return [f"{who}: the other ends with {done.code}: {done.err}"]
    return []


def check(bench: Bench, name: str, times: int, draw: random.Random) -> list[str]:
    """Kills in one verb; returns what was wrong."""
    place = bench.copy("whole")
    begun = time.perf_counter()
    for done in started(bench, place, name).done():
        if done.code:
            return [f"{name}, undisturbed: exit code {done.code}: {done.err}"]
    seconds, expected, faults = time.perf_counter() - begun, content(place), list[str]()
    run = bench.base / "run"
    before = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    for _ in range(times):
        place, moment, victim = bench.copy("disturbed"), draw.uniform(0.0, seconds), draw.randrange(MANY)
        where = f"{name}, rank {victim} killed after {moment:.3f} s"
        ranks = started(bench, place, name)
        ranks.meet()
        time.sleep(moment)
        ranks.processes[victim].kill()
        other = ranks.done(60)[1 - victim]
        faults += faults_of(other, where)
        faults += [f"{where}: {fault}" for fault in whole(place / "run", before)]
        for done in started(bench, place, name).done():
            faults += [f"{where}: the next call ends with {done.code}: {done.err}"] if done.code else []
        found = content(place)
        faults += [f"{where}: {path} is other than undisturbed" for path in expected if found.get(path) != expected[path]]
        faults += [f"{where}: {path} is left behind" for path in (*left(place), *(p for p in found if p not in expected))]
    return faults


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
