"""One of two processes that train by each of the libraries, over gloo; says what they ended with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.zoo.operators import declare
from prunekit import Trajectory, make_plan, score
from prunekit.integrations import Recording
from prunekit.integrations.accelerate import Accelerated
from tests.integrations.loops import BATCH, DECAY, LOOPS, LR, Samples, tiny


def by_library(folder: Path, library: str) -> None:
    """Trains without the callback, then recorded, then recorded with a mask held."""
    folder.mkdir(exist_ok=True)
    how = {"epochs": 1, "accumulate": 2, "bf16": True, "processes": 2, "clip": 0.0 if library == "transformers" else 0.3}
    loop, rank = LOOPS[library], os.environ["RANK"]
    model: nn.Module = tiny()
    if library == "lightning":
        model = nn.ModuleDict({"net": model})  # as it lies in the LightningModule
    plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
    for name, recording in (
        ("plain", None),
        ("recorded", Recording(folder / "r")),
        ("masked", Recording(folder / "t", plan=plan, second_moments=True)),
    ):
        torch.save(loop(folder / name, recording, **how).state_dict(), folder / f"{name}-{rank}.pt")


def by_accelerate(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    AcceleratorState._reset_state(reset_partial_state=False)  # the Trainer's was of another precision
    accelerator = Accelerator(cpu=True)
    plain = tiny()
    plan = make_plan(score(Trajectory.of(plain), plain, criterion="magnitude"), plain, sparsity=0.5)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=DECAY)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, DataLoader(Samples(), BATCH, shuffle=True))
    recording = Recording(folder / "t", plan=plan, second_moments=True)
    with Accelerated(recording, accelerator, model, optimizer, loader) as loop:
        for batch in loop:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            loop.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
    torch.save(plain.state_dict(), folder / f"{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    declare()
    torch.set_num_threads(1)
    for library in ("lightning", "transformers"):
        by_library(Path(sys.argv[1]) / library, library)
    by_accelerate(Path(sys.argv[1]) / "accelerate")
