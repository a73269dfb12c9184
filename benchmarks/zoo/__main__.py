"""Runs the zoo and writes docs/zoo.md: one process a model, with a time limit, so that a hang is one cell's fault."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from prunekit.progress import Bar, progress_bars

STEP_SECONDS = 120  # a step that takes longer counts as hanging


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose name matches, such as 'hf_*'")
    parser.add_argument("--fast", action="store_true", help="the models that make test walks through")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--out", type=Path, help="page to write; docs/zoo.md when all models run")
    parser.add_argument("--json", type=Path, help="file for every cell with its seconds")
    parser.add_argument("--walk", metavar="MODEL", help=argparse.SUPPRESS)  # one model, in a process of its own
    parser.add_argument("--steps", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.walk:
        return _walk(given.walk, given.folder, given.steps.split(","))
    return _zoo(given)


def _zoo(given: argparse.Namespace) -> int:
    from benchmarks.zoo import table
    from benchmarks.zoo.cells import Cell
    from benchmarks.zoo.page import page, totals

    wanted = [
        name for name, entry in table.MODELS.items() if fnmatch.fnmatch(name, given.only) and (entry.fast or not given.fast)
    ]
    if not wanted:
        print(f"no model of the zoo matches {given.only!r}", file=sys.stderr)
        return 2
    skipped = {name: package for name in wanted if (package := table.missing(name))}
    names = [name for name in wanted if name not in skipped]
    started = time.monotonic()
    with progress_bars(True), Bar("zoo (models)", len(names)) as bar, ThreadPoolExecutor(given.jobs) as pool:
        lock = threading.Lock()

        def one(name: str) -> dict[str, dict[str, object]]:
            found = _in_process(name)
            with lock:
                bar.advance()
            return found

        rows = dict(zip(names, pool.map(one, names), strict=True))
    seconds = time.monotonic() - started
    results = {name: {step: Cell(**cell) for step, cell in row.items()} for name, row in rows.items()}  # type: ignore[arg-type]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    out = given.out or (Path("docs/zoo.md") if given.only == "*" and not given.fast else None)
    text = page(results, seconds, skipped)
    if out is None:
        print(text)
    else:
        out.write_text(text)
    sums = totals(results)
    print(f"zoo: {sums} in {seconds:.0f} s" + (f" -> {out}" if out else ""))
    return 1 if sums["fault"] else 0


def _in_process(name: str) -> dict[str, dict[str, object]]:
    """Every cell of a model; a step that hangs or kills its process is a fault, and the walk goes on after it."""
    from benchmarks.zoo.entry import STEPS

    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        left = list(STEPS)
        while left:
            command = [sys.executable, "-m", "benchmarks.zoo", "--walk", name, "--folder", folder, "--steps", ",".join(left)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, errors="replace"
            )
            noise: list[str] = []
            threading.Thread(target=lambda p=process, n=noise: n.extend(p.stderr or ()), daemon=True).start()
            reason = ""
            while left:
                line, hung = _line(process, STEP_SECONDS)
                if line is None:
                    reason = (
                        f"took more than {STEP_SECONDS} s" if hung else "its process died: " + " ".join(noise[-3:]).strip()[-200:]
                    )
                    break
                found.update(json.loads(line))
                left = [step for step in left if step not in found]
            process.kill()
            process.wait()
            if left:
                found[left[0]] = {"verdict": "fault", "why": reason, "where": "", "seconds": float(STEP_SECONDS)}
                left = left[1:]
    return {step: found[step] for step in STEPS}


def _line(process: subprocess.Popen[str], seconds: float) -> tuple[str | None, bool]:
    """The next line that the process says; None at its end, or when it says nothing for so long (then True)."""
    hung = threading.Event()

    def stop() -> None:
        hung.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    timer.cancel()
    return line or None, hung.is_set()


def _walk(name: str, folder: Path, steps: list[str]) -> int:
    import warnings

    import torch

    from benchmarks.zoo.steps import Walk

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not mix with the cells
    for step, cell in Walk(name, folder).cells(steps):
        print(json.dumps({step: asdict(cell)}), file=stdout, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
