"""Two processes train together: one writes, both hold the mask, and a step's samples are those of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunekit import Trajectory
from tests.integrations.loops import BATCH, COUNT, check_first_gradient, tiny


@pytest.mark.slow
def test_one_process_writes_what_both_see(tmp_path: Path) -> None:
    """Two interpreters import torch and accelerate: that is what takes its seconds."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'prunekit[hf]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.two", str(tmp_path)],
            env={**os.environ, **facts, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for one in both:
            assert one.wait(120) == 0, one.stderr.read() if one.stderr else ""
    finally:
        for one in both:
            one.kill()
    path = Trajectory(tmp_path / "t")
    assert path.complete
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    state = path.layout.views(path.state(-1))
    trained = dict(tiny().named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in trained)
    assert all(torch.equal(state[name], first[name]) for name in trained)
    pairs = [path.step(s).batches or () for s in range(len(path))]
    assert all(len(pair) == 2 and all(len(b) == BATCH for b in pair) for pair in pairs)
    assert {k for pair in pairs for b in pair for k in b} == set(range(COUNT))

    # The first step's gradient, from the noted samples of both: each process's mean, averaged, clipped as noted.
    model = tiny()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(path.layout.views(path.state(0))[name])
    check_first_gradient(path, model)
