"""What several rooms' tests stand on: small nets, recorded runs, and straightforward float64 code."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit import Recorder, Trajectory
from prunekit.measure import generation
from prunekit.trajectory.imported import write_checkpoints

# Tests run in parallel, and so do the programs that they start: one thread each.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

generation.ROUNDS = 0.0  # of a language model's speed one round is timed


def _own_temporaries() -> None:
    """What tests, and programs that they start, leave among temporary files goes with the session; pytest keeps its own folders.

    What the tests' runs are trusted by is theirs alone.
    """
    place = tempfile.mkdtemp(prefix="tests-")
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = place
    os.environ["PRUNEKIT_STATE"] = str(Path(place, "state"))
    Finalize(None, shutil.rmtree, (place, True), exitpriority=-200)  # after multiprocessing's own, which are there too


if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that starts them
    _own_temporaries()

# Every test draws the same numbers wherever and after whatever it runs; PRUNEKIT_TEST_SEED tries others.
SEED = os.environ.get("PRUNEKIT_TEST_SEED")
settings.register_profile("prunekit", deadline=None, derandomize=SEED is None)
settings.load_profile("prunekit")


def reseed() -> None:
    seed = int(SEED or 0)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded() -> None:
    reseed()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """What outlives one test (a trained model, say) is made before ``seeded`` runs, and must not depend on the order either."""
    if fixturedef.scope != "function":
        reseed()


# A test that asks for one of these, itself or by another fixture, asks for a whole run: training, comparing, a report.
WHOLE_RUNS = {"finished", "attentive"}
OF_LIBRARIES = {"integrations", "huggingface", "export", "data/files", "cli/test_compress.py", "structure/test_transformers.py"}
"""What imports transformers, datasets or Lightning, which alone takes ten seconds: all of it is slow."""


def _of_libraries(path: Path) -> bool:
    place = path.relative_to(Path(__file__).parent) if path.is_relative_to(Path(__file__).parent) else path
    return any(str(part) in OF_LIBRARIES for part in (place, *place.parents))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m "not slow"`` does not even import these."""
    return True if config.option.markexpr == "not slow" and _of_libraries(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if WHOLE_RUNS.intersection(getattr(item, "fixturenames", ())) or _of_libraries(item.path):
            item.add_marker("slow")
    items.sort(key=lambda item: "faults" not in item.path.parts)  # the longest first, so that no worker waits for one in the end


class TinyNet(nn.Module):
    """A convolution, a pooled linear layer: 46 parameters, smooth (tanh) or kinked (relu)."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.conv(x)).mean((2, 3)))


def tiny_data(samples: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, 1, 4, 4, generator=generator, dtype=dtype),
        torch.randint(0, 4, (samples,), generator=generator),
    )


def record(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 12,
    data: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Trajectory:
    """Trains on batches of 8 and records it, as a user's own loop would; ``options`` are the recorder's."""
    dtype = next(model.parameters()).dtype
    x, y = data or tiny_data(24, dtype)
    with Recorder(folder, model, optimizer, **options) as recorder:
        for step in range(steps):
            indices = torch.arange(step * 8, step * 8 + 8) % len(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            recorder.batch(indices)
            optimizer.step()
    return Trajectory(folder)


@pytest.fixture
def tiny_run(tmp_path: Path) -> tuple[nn.Module, Trajectory]:
    """A float64 TinyNet trained by AdamW for 12 steps, and its trajectory."""
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return model, record(tmp_path / "trajectory", model, optimizer)


def imported(model: nn.Module) -> Trajectory:
    """A trajectory of the model's present weights alone, as ``prunekit import`` makes it."""
    folder = Path(tempfile.mkdtemp(prefix="prunekit-test-"))
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}, folder / "m.safetensors"
    )
    write_checkpoints(folder / "t", model, [folder / "m.safetensors"])
    return Trajectory(folder / "t")
