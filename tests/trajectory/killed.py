"""A training loop that is recorded in a process of its own, so that it can be killed at any moment, and taken up again."""

from __future__ import annotations

import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it; here once, in the server that the processes are forked from
import torch.nn.functional as F
from torch import nn

from prunekit import Recorder

STEPS = 120


def loop(folder: Path, options: dict[str, Any], pause: float, steps: Connection) -> None:
    """Starts a recording, or goes on with the one in ``folder``; says through ``steps`` which one comes next, the first too."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.ReLU(), nn.Dropout(0.3), nn.Linear(300, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS)
    x, y = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4
    if (folder / "snapshot.safetensors").exists():
        recorder = Recorder.resume(folder, model, optimizer, schedule)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # killed before the first snapshot: there is nothing to go on with
        recorder = Recorder(folder, model, optimizer, scheduler=schedule, snapshot_every=7, **options)
    with recorder:
        for step in range(recorder.steps, STEPS):
            steps.send(step)
            indices = torch.randint(0, 64, (8,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            recorder.batch(indices)
            optimizer.step()
            schedule.step()
            time.sleep(pause)
