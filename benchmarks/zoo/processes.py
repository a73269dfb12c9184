"""One process a model, forked from a server that has the libraries already, with a time limit for every step."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.zoo.cells import FAULT, Cell
from benchmarks.zoo.entry import STEPS
from benchmarks.zoo.steps import Walk

STEP_SECONDS = 300  # a step that takes longer counts as hanging; most take one second, on a busy machine ten
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.zoo.preload"])


def row(name: str) -> dict[str, Cell]:
    """Every cell of a model; a step that hangs or kills its process is a fault, and the walk goes on after it."""
    found: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        while left := [step for step in STEPS if step not in found]:
            ours, theirs = PROCESSES.Pipe(duplex=False)
            process = PROCESSES.Process(target=_walk, args=(name, Path(folder), left, theirs), daemon=True)
            process.start()
            theirs.close()
            for step in left:
                try:
                    hangs = not ours.poll(STEP_SECONDS)
                    found[step] = Cell(FAULT, f"took more than {STEP_SECONDS} s") if hangs else ours.recv()
                except EOFError:
                    hangs, found[step] = True, Cell(FAULT, "its process died")
                if hangs:
                    break
            process.kill()
            process.join()
    return found


def _walk(name: str, folder: Path, steps: list[str], results: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for _, cell in Walk(name, folder).cells(steps):
        results.send(cell)
