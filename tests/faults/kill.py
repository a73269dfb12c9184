"""Kills every writing verb at every one of its durable operations, or at random moments, and looks at what is left.

``python -m tests.faults.kill`` kills at every operation, ``--random N`` at N moments of each verb; ``--full-disk`` fills the disk
at every operation, which is to be told in one line. What must hold each time:

- before anything else is called, whatever stood before stands, old or new, and proves itself;
- the same verb, called again, succeeds, and leaves what an undisturbed call leaves, and nothing else.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from prunekit import checkpoint
from prunekit.apply import Manifest
from prunekit.errors import PrunekitError
from prunekit.trajectory import Trajectory
from tests.faults.bench import Bench, Hook
from tests.faults.small import content

VERBS: dict[str, tuple[str, ...]] = {
    "train": ("train", "RECIPE", "--out", "NEW"),
    "train-overwrite": ("train", "OTHER", "--out", "RUN", "--overwrite"),
    "import": ("import", "--model", "tests.faults.small:build", "--weights", "WEIGHTS", "--data", "tests.faults.small:data",
               "--out", "NEW"),
    "import-overwrite": ("import", "--model", "tests.faults.small:build", "--weights", "WEIGHTS", "--out", "RUN", "--overwrite"),
    "score": ("score", "RUN", "-c", "snip"),
    "score-overwrite": ("score", "RUN", "-c", "influence", "--overwrite"),
    "compare": ("compare", "RUN", "--overwrite"),
    "sensitivity": ("sensitivity", "RUN", "-c", "magnitude", "--sparsity", "0.5"),
    "prune": ("prune", "RUN", "-c", "magnitude", "-s", "0.3", "--name", "new"),
    "prune-overwrite": ("prune", "RUN", "-c", "magnitude", "-s", "0.25", "--structure", "channels", "--name", "small",
                        "--overwrite"),
    "prune-finetune": ("prune", "RUN", "-c", "magnitude", "-s", "0.3", "--finetune", "1", "--name", "loose", "--overwrite"),
    "dry-run": ("prune", "RUN", "-c", "magnitude", "-s", "0.3", "--name", "plan", "--dry-run"),
    "eval": ("eval", "RUN/pruned/loose", "--overwrite"),
    "export": ("export", "RUN/pruned/small", "--to", "state-dict", "NEW"),
    "explain": ("explain", "RUN", "layer", "0"),
    "report": ("report", "RUN"),
    "study": ("compare", "STUDY", "--out", "TRAINED"),
    "study-trains": ("compare", "STUDY", "--out", "NEW"),
    "run": ("run", "RECIPE", "--out", "NEW"),
    "compress": ("compress", "MODEL", "--data", "tests.faults.small:words", "-s", "0.5", "-c", "magnitude", "--no-refine",
                 "--out", "NEW"),
}  # fmt: skip
"""Name -> arguments; NEW is a folder that is not there yet, TRAINED one of a study that has trained its run and no more."""


TEMPORARY = re.compile(r"\.prunekit\.\w+\.tmp")


def whole(run: Path, before: set[str]) -> list[str]:
    """What is wrong with the artifacts that stood before, as they stand now."""
    faults = [f"{name} is gone" for name in sorted(before) if not (run / name).exists() and not _may_go(name)]
    for path in sorted(run.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(run).parts) or "trajectory.partial" in str(path):
            continue
        try:
            if path.name == "trajectory.json":
                Trajectory(path.parent).verify()
            elif path.name == "prunekit.json":
                Manifest.load(path).prove(path.parent)
            elif path.suffix == ".json":
                checkpoint.read_json(path)
            elif path.suffix == ".safetensors":
                checkpoint.read_tensors(path)
        except PrunekitError as error:
            faults.append(str(error))
    return faults


def _may_go(name: str) -> bool:
    """What a new artifact does not have: an evaluation of the model that was replaced, and the training of an imported one."""
    return (name.startswith("pruned/") and not name.endswith(("prunekit.json", "plan.safetensors", "model.safetensors"))) or (
        name in ("train.json", "trajectory/start.safetensors", "trajectory/ended.safetensors")
    )


def differences(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """What is wrong with a folder where all went well in the end, of which undisturbed ``content`` says what is expected."""
    found = content(folder)
    left = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".prunekit") or ".partial" in p.name]
    changed = [f"{path} is other than undisturbed" for path in expected if found.get(path) != expected[path]]
    return changed + [
        f"{path} is left behind" for path in dict.fromkeys((*left, *(path for path in found if path not in expected)))
    ]


def as_it_is(folder: Path) -> str:
    """Digest of every file and folder, whatever temporaries are called."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: TEMPORARY.sub("x", str(path))):
        total.update(TEMPORARY.sub("x", str(path.relative_to(folder))).encode())
        total.update(path.read_bytes() if path.is_file() else b"/")
    return total.hexdigest()


class Way(NamedTuple):
    """How a call is disturbed: ``hook`` makes what is called before each operation, given the number of the fatal one."""

    name: str
    hook: Callable[[int], Hook]
    ends: tuple[int, ...]


def kills(fatal: int) -> Hook:
    """Ends the process as no handler can notice."""
    counted = itertools.count(1)

    def end(what: str, path: Path) -> None:
        if next(counted) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    return end


def fills_the_disk(fatal: int) -> Hook:
    """From that operation on nothing can be written, while renaming and removing goes on."""
    counted = itertools.count(1)

    def full(what: str, path: Path) -> None:
        if next(counted) >= fatal and what in ("write", "sync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return full


KILLED = Way("killed", kills, (0, -signal.SIGKILL))
FULL = Way("with a disk that is full", fills_the_disk, (0, 1))


def check(bench: Bench, name: str, way: Way, moments: int | None, draw: random.Random) -> tuple[int, list[str]]:
    """Disturbs one verb at every operation, or kills it at so many moments; returns how often, and what was wrong."""
    verb, counted = VERBS[name], bench.folder / "counted"
    place = bench.copy("whole")
    counted.write_text("")

    def count(what: str, path: Path) -> None:
        with counted.open("a") as file:
            file.write(".")

    begun = time.perf_counter()
    if (done := bench.call(place, verb, count)).code != 0:
        return 0, [f"undisturbed: exit code {done.code}: {done.err}"]
    seconds, operations = time.perf_counter() - begun, len(counted.read_text())
    expected, faults = content(place), []
    states: set[str] = set()
    run = bench.base / "run"
    before = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    times = operations if moments is None else moments
    for fatal in range(1, times + 1):
        place, moment = bench.copy("disturbed"), draw.uniform(0.0, seconds)
        done = bench.call(place, verb, way.hook(fatal)) if moments is None else bench.call(place, verb, after=moment)
        where = f"{name}, {way.name} " + (f"at operation {fatal} of {operations}" if moments is None else f"after {moment:.3f} s")
        lines = [line for line in done.err.splitlines() if line.startswith("prunekit: ")]
        if done.code not in way.ends or "Traceback" in done.err or (done.code == 1 and len(lines) != 1):
            faults.append(f"{where}: exit code {done.code}: {done.err}")
            continue
        if (state := as_it_is(place)) in states:
            continue  # the next call would do the same again
        states.add(state)
        faults += [f"{where}: {fault}" for fault in whole(place / "run", before)]
        if (done := bench.call(place, verb)).code != 0:
            faults.append(f"{where}: the next call ends with {done.code}: {done.err}")
            continue
        faults += [f"{where}: {fault}" for fault in differences(place, expected)]
    return times, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verbs", nargs="*", help=f"of {', '.join(VERBS)}; all of them by default")
    parser.add_argument("--random", type=int, metavar="N", help="kill at so many random moments instead")
    parser.add_argument("--full-disk", action="store_true", help="fill the disk at every operation instead")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    way = FULL if asked.full_disk else KILLED
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), pretrained="compress" in (asked.verbs or VERBS))
        total, bad = 0, 0
        for name in asked.verbs or VERBS:
            begun = time.perf_counter()
            count, faults = check(bench, name, way, asked.random, random.Random(f"{asked.seed} {name}"))
            print(f"{name}: {count} times {way.name}, {len(faults)} faults, {time.perf_counter() - begun:.1f} s", flush=True)
            for fault in faults:
                print(f"  {fault}", flush=True)
            total, bad = total + count, bad + len(faults)
    print(f"{total} times {way.name}, {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
