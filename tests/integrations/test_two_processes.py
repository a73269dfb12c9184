"""Two processes train together: one writes, both hold the mask, and a step's samples are those of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunekit import Trajectory
from prunekit.kernel import ModelFunction
from prunekit.kernel.reconstruction import reconstruct
from tests.integrations.loops import BATCH, COUNT, Samples, check_first_gradient, tiny


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the two for every library at once: importing torch and the libraries is what takes these tests their seconds."""
    for library in ("accelerate", "transformers", "lightning"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'prunekit[hf,lightning]'")
    folder = tmp_path_factory.mktemp("both")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.two", str(folder)],
            env={**os.environ, **facts, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for one in started:
            assert one.wait(300) == 0, one.stderr.read() if one.stderr else ""
    finally:
        for one in started:
            one.kill()
    return folder


def first_step(path: Trajectory) -> None:
    """The first step's gradient, from the noted samples of both: each process's mean, averaged, clipped as noted."""
    model = tiny()
    state = path.layout.views(path.state(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.get(name, state.get(f"net.{name}")))
    check_first_gradient(path, model)


@pytest.mark.exhaustive
def test_one_process_writes_what_both_see(both: Path) -> None:
    folder = both / "accelerate"
    path = Trajectory(folder / "t")
    assert path.complete
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    state = path.layout.views(path.state(-1))
    trained = dict(tiny().named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in trained)
    assert all(torch.equal(state[name], first[name]) for name in trained)
    pairs = [path.step(s).batches or () for s in range(len(path))]
    assert all(len(pair) == 2 and all(len(b) == BATCH for b in pair) for pair in pairs)
    assert {k for pair in pairs for b in pair for k in b} == set(range(COUNT))
    first_step(path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_trainers_train_together(both: Path, library: str) -> None:
    """Accumulated, in bfloat16: the same weights as without the callback, masks exact, the path whole."""
    folder = both / library
    found = {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in ("plain", "recorded", "masked")
    }
    trained = list(dict(tiny().named_parameters()))
    for first, second in found.values():
        assert all(torch.equal(first[name], second[name]) for name in trained)
    assert all(torch.equal(found["plain"][0][name], found["recorded"][0][name]) for name in trained)
    for where, name in (("r", "recorded"), ("t", "masked")):
        path = Trajectory(folder / where)
        assert path.complete
        state = {name.removeprefix("net."): tensor for name, tensor in path.layout.views(path.state(-1)).items()}
        assert all(torch.equal(state[each], found[name][0][each]) for each in trained)
    zeros = sum(int((found["masked"][0][name] == 0).sum()) for name in ("first.weight", "last.weight"))
    assert zeros == round(0.5 * (60 + 30))
    assert {k for s in range(len(path)) for b in path.step(s).batches or () for k in b} == set(range(COUNT))
    inside: nn.Module = Net() if library == "lightning" else tiny()
    function = ModelFunction(inside, path.layout, path.fixed, "outputs", torch.device("cpu"))
    rebuilt = reconstruct(function, path.segments(), Samples().x[:5], Samples().y[:5])
    assert float(rebuilt.error.max()) < 1e-3


class Net(nn.Module):
    """The classifier as it lies in the LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)
