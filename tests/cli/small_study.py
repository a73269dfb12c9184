"""A study of two seeds and ten pruned models, done in a second or two; its data can kill a worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MINE = """
import multiprocessing, os, pathlib, signal
from prunekit.data import digits

HERE = pathlib.Path(__file__).parent

def data(seed: int = 0):
    if multiprocessing.parent_process() is not None and (HERE / "kill").exists():
        (HERE / "kill").rename(HERE / "killed")
        os.kill(os.getpid(), signal.SIGKILL)
    return digits(seed=seed)
"""
RECIPE = """
threads: 1
model: {factory: "prunekit.models:digits_mlp", args: {hidden: [8, 8]}}
data: {factory: "mine:data"}
train: {optimizer: {name: sgd, lr: 0.1}, epochs: 1, batch_size: 128}
"""
STUDY = """
cases: {small: small.yaml}
seeds: [0, 1]
samples: 16
criteria: [magnitude, random]
structures: {unstructured: [0.8]}
allocations: {unstructured: [global]}
leading: 0
always: [magnitude]
tune: {epochs: 1, sparsities: {unstructured: [0.8]}}
"""


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields its file, in a folder that is the working one."""
    (folder / "mine.py").write_text(MINE)
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "study.yaml").write_text(STUDY)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    sys.modules.pop("mine", None)
    yield folder / "study.yaml"
    sys.modules.pop("mine", None)
