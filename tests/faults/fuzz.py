"""Changes one file of a finished run, in one of many ways, and calls a verb on it.

``python -m tests.faults.fuzz 10000``. What must hold each time: the verb refuses in one line of ours, with exit code 1 or 2, or
does what it does undisturbed; it ends, imports nothing that a file names, and writes nothing outside the run. Of files that were
*forged*, changed with checksums that fit, only the last three are asked, and that nothing of Python's reaches the user.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prunekit import checkpoint
from tests.faults.bench import Bench, Done
from tests.faults.small import content

VERBS: dict[str, tuple[str, ...]] = {
    "info": ("info", "RUN"),
    "info-trajectory": ("info", "RUN/trajectory"),
    "info-pruned": ("info", "RUN/pruned/small"),
    "train": ("train", "RECIPE", "--out", "RUN"),
    "score": ("score", "RUN", "-c", "magnitude", "-c", "influence"),
    "score-new": ("score", "RUN", "-c", "snip"),
    "score-composed": ("score", "RUN", "-c", "influence*magnitude"),
    "compare": ("compare", "RUN"),
    "sensitivity": ("sensitivity", "RUN", "-c", "magnitude", "--sparsity", "0.5"),
    "prune": ("prune", "RUN", "-c", "magnitude", "-s", "0.3", "--name", "new"),
    "prune-again": ("prune", "RUN", "-c", "magnitude", "-s", "0.5", "--structure", "channels", "--name", "small", "--no-refine"),
    "auto": ("prune", "RUN", "-s", "0.3", "--no-refine", "--name", "new"),
    "apply": ("prune", "RUN", "--apply", "RUN/pruned/loose/plan.safetensors", "--overwrite"),
    "eval": ("eval", "RUN/pruned/small"),
    "eval-masked": ("eval", "RUN/pruned/loose"),
    "export": ("export", "RUN/pruned/small", "--to", "state-dict", "RUN/exported"),
    "explain-pruned": ("explain", "RUN/pruned/small", "--json"),
    "explain-layer": ("explain", "RUN", "layer", "0", "--json"),
    "explain-weight": ("explain", "RUN", "weight", "0.weight", "1,2", "--json"),
    "explain-sample": ("explain", "RUN", "sample", "1", "--json"),
    "explain-diff": ("explain", "RUN", "diff", "small", "--json"),
    "report": ("report", "RUN"),
    "run": ("run", "RECIPE", "--out", "RUN"),
}  # fmt: skip
EVIL = "tests.faults.evil:build"
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 1e308, 0.5, "", "x", "../../x", "/etc/passwd", EVIL, "\x1b[31mred", "$\\frac{", "a" * 5000, [],
    {}, [[]], {"x": {}}, "nan",
)  # fmt: skip
EXPECTED_CODES = (1, 2)
Draw = random.Random


class Mutation(NamedTuple):
    """What was done to a file; ``forged``: its checksums fit what it now says."""

    what: str
    forged: bool = False


def flip(path: Path, draw: Draw) -> Mutation | None:
    data = bytearray(path.read_bytes())
    if not data:
        return None
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    return Mutation(f"bit of byte {place} flipped")


def chunk(path: Path, draw: Draw) -> Mutation | None:
    data = path.read_bytes()
    if len(data) < 4:
        return None
    start, end = sorted(draw.sample(range(len(data) + 1), 2))
    how = draw.choice(["removed", "zeroed", "doubled", "cut off", "random"])
    middle = {"removed": b"", "zeroed": bytes(end - start), "doubled": 2 * data[start:end], "random": draw.randbytes(end - start)}
    path.write_bytes(data[:start] if how == "cut off" else data[:start] + middle[how] + data[end:])
    return Mutation(f"bytes {start} to {end} {how}")


def append(path: Path, draw: Draw) -> Mutation:
    with path.open("ab") as file:
        file.write(draw.choice([b"\0", b" ", b"{}", b"\n\n", b"x" * 100]))
    return Mutation("lengthened")


def empty(path: Path, draw: Draw) -> Mutation:
    path.write_bytes(b"")
    return Mutation("emptied")


def remove(path: Path, draw: Draw) -> Mutation:
    path.unlink()
    return Mutation("removed")


def replace(path: Path, draw: Draw) -> Mutation:
    """Another file of the run, a folder, a pipe, a device, a link that leads out."""
    others = [p for p in sorted(path.parent.rglob("*")) if p.is_file() and p.suffix == path.suffix and p != path]
    kind = draw.choice(["folder", "pipe", "device", "link", "endless link", *(["file"] * 3 if others else [])])
    data = draw.choice(others).read_bytes() if others else b""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "endless link":
        path.symlink_to(path.name)
    else:
        path.write_bytes(data)
    return Mutation(f"replaced by another {kind}" if kind == "file" else f"replaced by a {kind}")


def structure(path: Path, draw: Draw) -> Mutation | None:
    """One value of a JSON file, a header or a recipe is another one; its checksums are made to fit, or not."""
    forged = draw.random() < 0.5
    if path.suffix == ".json":
        whole = json.loads(path.read_text())
        proof = whole.pop(checkpoint.CHECKSUM, None)
        what = _change(whole, draw)
        if forged:
            checkpoint.write_json(path, whole)
        else:
            path.write_text(json.dumps({**whole, checkpoint.CHECKSUM: proof}))
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        number = draw.randrange(len(lines))
        step = json.loads(lines[number])
        what, forged = _change(step, draw), False
        path.write_text("\n".join([*lines[:number], json.dumps(step), *lines[number + 1 :]]) + "\n")
    elif path.suffix == ".safetensors":
        header = checkpoint.read_header(path)
        if not header:
            return None
        tensors = checkpoint.read_tensors(path)
        what, forged = _change(header, draw), True
        header.pop(checkpoint.TENSORS, None)
        checkpoint.write_tensors(path, tensors, header)
    elif path.suffix == ".yaml":
        import yaml

        whole = yaml.safe_load(path.read_text())
        what, forged = _change(whole, draw), True
        first = path.read_text().partition("\n")[0]
        path.write_text((first + "\n" if first.startswith("#") else "") + yaml.safe_dump(whole))
    else:
        return None
    return Mutation(what, forged)


def _change(whole: Any, draw: Draw) -> str:
    """Changes one value at any depth, or removes or renames its key."""
    places: list[tuple[Any, Any, str]] = []

    def walk(value: Any, name: str) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            places.append((value, key, f"{name}.{key}"))
            walk(inner, f"{name}.{key}")

    walk(whole, "")
    if not places:
        whole["x"] = 1
        return "a key added"
    container, key, name = draw.choice(places)
    how = draw.random()
    if how < 0.15 and isinstance(container, dict):
        del container[key]
        return f"{name} removed"
    if how < 0.25 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
        return f"{name} renamed"
    if how < 0.5 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        container[key] = draw.choice([container[key] + 1, -container[key], container[key] * 1.5, 0])
    else:
        container[key] = draw.choice(VALUES)
    return f"{name} = {str(container[key])[:40]!r}"


MUTATIONS: list[Callable[[Path, Draw], Mutation | None]] = [
    flip, flip, chunk, chunk, append, empty, remove, replace, structure, structure, structure,
]  # fmt: skip


def files(run: Path) -> list[Path]:
    """What may be changed: everything but what is only looked at."""
    skipped = (".png", ".html", ".csv")
    return sorted(p for p in run.rglob("*") if p.is_file() and p.suffix not in skipped and p.name != ".lock")


class Fuzz:
    """Undisturbed results by verb, and what was wrong."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.expected: dict[str, dict[str, str]] = {}
        self.reads: dict[str, list[str]] = {}
        self.base = content(bench.base)
        self.outside = bench.folder / "outside"
        self.outside.mkdir()
        self.marker = bench.folder / "ran"
        os.environ["PRUNEKIT_EVIL"] = str(self.marker)
        self.seen: collections.Counter[str] = collections.Counter()

    def one(self, draw: Draw) -> list[str]:
        """One mutation and one verb."""
        name = draw.choice(sorted(VERBS))
        place = self.bench.copy("mutated")
        if name not in self.expected:
            self._call_undisturbed(name)
        changeable = files(place / "run")
        read = [path for path in changeable if str(path.relative_to(place)) in self.reads[name]]
        path = draw.choice(read if read and draw.random() < 0.8 else changeable)
        mutation = draw.choice(MUTATIONS)(path, draw)
        if mutation is None:
            return []
        known = set(self.bench.folder.iterdir())
        begun = time.perf_counter()
        done = self.bench.call(place, VERBS[name], limit=30)
        seconds = time.perf_counter() - begun
        where = f"{name}: {path.relative_to(place)}: {mutation.what}{' (forged)' if mutation.forged else ''}"
        return [f"{where}: {fault}" for fault in self._faults(name, path, place, mutation, done, seconds, known)]

    def _call_undisturbed(self, name: str) -> None:
        whole = self.bench.copy("whole")
        done = self.bench.call(whole, VERBS[name])
        if done.code != 0:
            raise RuntimeError(f"{name}, undisturbed, ends with {done.code}: {done.err}")
        self.reads[name] = [str(path.relative_to(whole)) for path in self.bench.opened(whole)]
        self.expected[name] = content(whole)

    def _faults(
        self, name: str, path: Path, place: Path, mutation: Mutation, done: Done, seconds: float, known: set[Path]
    ) -> list[str]:
        faults = []
        lines = [line for line in done.err.splitlines() if line.startswith("prunekit: ") and "prunekit: note:" not in line]
        if -done.code in (signal.SIGALRM, signal.SIGPROF):
            faults.append(f"hangs ({seconds:.0f} s)")
        elif done.code not in (0, *EXPECTED_CODES):
            faults.append(f"ends with {done.code}: {done.err[-300:]}")
        elif "Traceback" in done.err or "PRUNEKIT_DEBUG" in done.err:
            faults.append(f"says {done.err[-400:]}")
        elif done.code != 0 and len(lines) != 1:
            faults.append(f"says {len(lines)} lines: {done.err[-300:]}")
        elif "\x1b" in done.out or "\x1b" in done.err:
            faults.append("lets an escape through to the terminal")
        elif done.code == 0 and not mutation.forged and (other := self._other(name, path, place)) and not self._told(done, path):
            faults.append(f"is silent, and leaves other {', '.join(other[:4])}")
        if self.marker.exists():
            faults.append("ran code that the file names")
            self.marker.unlink()
        if new := [p.name for p in self.bench.folder.iterdir() if p not in known] + list(self.outside.iterdir()):
            faults.append(f"wrote outside: {new}")
        self.seen["refused" if done.code else "told or the same"] += 1
        return faults

    def _other(self, name: str, path: Path, place: Path) -> list[str]:
        """Files that differ from what the verb leaves undisturbed, but for the changed one where the verb does not write it."""
        expected, own = self.expected[name], str(path.relative_to(place))
        found = content(place)
        untouched = expected.get(own) == self.base.get(own)
        return [p for p in expected if found.get(p) != expected[p] and not (p == own and untouched)]

    def _told(self, done: Done, path: Path) -> bool:
        """Whether a report says what it left out."""
        return str(path) in done.out + done.err


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="how many mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this one of the seed's mutations alone")
    asked = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Bench(Path(folder)))
        for number in range(asked.count) if asked.only is None else [asked.only]:
            for fault in fuzz.one(random.Random(f"{asked.seed} {number}")):
                print(f"{number}: {fault}", flush=True)
                bad += 1
    seen = ", ".join(f"{count} {what}" for what, count in sorted(fuzz.seen.items()))
    print(f"{asked.count} mutations: {seen}; {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
