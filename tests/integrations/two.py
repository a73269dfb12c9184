"""One of two processes of a training by Accelerate, over gloo; says what it ended with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from prunekit import Trajectory, make_plan, score
from prunekit.integrations import Recording
from prunekit.integrations.accelerate import Accelerated
from tests.integrations.loops import BATCH, DECAY, LR, Samples, tiny


def train(folder: Path) -> None:
    torch.set_num_threads(1)
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
    train(Path(sys.argv[1]))
