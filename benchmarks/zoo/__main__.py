"""Runs the zoo and writes docs/zoo.md: one process a model, with a time limit, so that a hang is one cell's fault."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there, in every process
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.zoo import table
from benchmarks.zoo.cells import FAULT, Cell
from benchmarks.zoo.page import page, totals
from benchmarks.zoo.processes import row
from prunekit.progress import Bar, progress_bars


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose name matches, such as 'hf_*'")
    parser.add_argument("--fast", action="store_true", help="the models that make test walks through")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--out", type=Path, help="page to write; docs/zoo.md when all models run")
    parser.add_argument("--json", type=Path, help="file for every cell with its seconds, written as they come")
    given = parser.parse_args()
    wanted = [
        name for name, entry in table.MODELS.items() if fnmatch.fnmatch(name, given.only) and (entry.fast or not given.fast)
    ]
    if not wanted:
        print(f"no model of the zoo matches {given.only!r}", file=sys.stderr)
        return 2
    skipped = {name: package for name in wanted if (package := table.missing(name))}
    names = [name for name in wanted if name not in skipped]
    started = time.monotonic()
    results: dict[str, dict[str, Cell]] = {}
    with progress_bars(True), Bar("zoo (models)", len(names)) as bar, ThreadPoolExecutor(given.jobs) as pool:
        for name, cells in zip(names, pool.map(row, names), strict=True):
            results[name] = cells
            bar.advance()
            if given.json:
                rows = {n: {step: asdict(cell) for step, cell in r.items()} for n, r in results.items()}
                given.json.write_text(json.dumps(rows, indent=1))
    seconds = time.monotonic() - started
    out = given.out or (Path("docs/zoo.md") if given.only == "*" and not given.fast else None)
    text = page(results, seconds, skipped)
    if out is None:
        print(text)
    else:
        out.write_text(text)
    sums = totals(results)
    print(f"zoo: {sums} in {seconds:.0f} s" + (f" -> {out}" if out else ""))
    return 1 if sums[FAULT] else 0


if __name__ == "__main__":
    sys.exit(main())
