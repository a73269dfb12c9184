"""States that were not kept come back by taking the steps again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import PrunekitError, Recorder, Trajectory, UsageError
from prunekit.kernel import ModelFunction, attribute
from prunekit.trajectory import replay
from tests.conftest import TinyNet, tiny_data

X, Y = tiny_data(24)
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
}


def batch(indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    noise = 0.0 if seed is None else torch.randn(len(indices), 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return X[indices] + noise, Y[indices]


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 4))


def train(folder: Path, make: MakeOptimizer, every: int, model: nn.Module | None = None) -> tuple[nn.Module, Trajectory]:
    """With a schedule, seeded augmentation, clipping and dropout."""
    torch.manual_seed(0)
    model = net() if model is None else model
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 23)
    with Recorder(folder, model, optimizer, every=every) as recorder:
        for step in range(23):
            indices = torch.arange(step, step + 8) % 24
            optimizer.zero_grad()
            F.cross_entropy(model(batch(indices, step)[0]), Y[indices]).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            recorder.gradient_scale(min(1.0, 0.5 / (float(norm) + 1e-6)))
            recorder.batch(indices, seed=step)
            optimizer.step()
            schedule.step()
    return model, Trajectory(folder)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_replayed_is_every_step(tmp_path: Path, name: str) -> None:
    _, whole = train(tmp_path / "whole", OPTIMIZERS[name], 1)
    _, sparse = train(tmp_path / "sparse", OPTIMIZERS[name], 5)
    assert sparse.kept == {0, 5, 10, 15, 20, 23}
    model = net()
    found = replay(
        sparse, model, OPTIMIZERS[name](model), batch, F.cross_entropy, tmp_path / "again", second_moments=name == "adamw"
    )
    assert len(found) == found.pieces == len(whole)
    for index in range(len(whole) + 1):
        torch.testing.assert_close(found.state(index), whole.state(index), rtol=0, atol=1e-7)
    assert [found.step(s).batches for s in range(23)] == [whole.step(s).batches for s in range(23)]
    assert [found.step(s).seeds for s in range(23)] == [whole.step(s).seeds for s in range(23)]
    x, y = tiny_data(3, seed=11)
    scores = [
        next(attribute(ModelFunction(net(), path.layout, path.fixed), path.segments, x, y)).scores for path in (found, whole)
    ]
    for key in scores[0]:
        torch.testing.assert_close(scores[0][key], scores[1][key], rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_and_those_that_are_none(tmp_path: Path) -> None:
    def loop(folder: Path, every: int) -> Trajectory:
        torch.manual_seed(0)
        model = TinyNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with Recorder(folder, model, optimizer, every=every) as recorder:
            for step in range(8):
                optimizer.zero_grad()
                for part in (torch.arange(step, step + 4), torch.arange(step + 8, step + 14)):
                    (F.cross_entropy(model(X[part]), Y[part]) / 2).backward()
                    recorder.batch(part)
                if step % 3 == 0:
                    model.conv.weight.grad = None
                optimizer.step()
        return Trajectory(folder)

    whole, sparse = loop(tmp_path / "whole", 1), loop(tmp_path / "sparse", 4)
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = replay(sparse, model, optimizer, batch, F.cross_entropy, tmp_path / "again")
    for index in range(9):
        torch.testing.assert_close(found.state(index), whole.state(index), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": lambda out, y: 2 * F.cross_entropy(out, y)}, "differ from state 5"),
        ({"batch": lambda i, s: batch(i)}, "differ from"),
    ],
)
def test_another_loss_or_other_data_is_noticed(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    _, sparse = train(tmp_path / "sparse", OPTIMIZERS["sgd"], 5)
    model = net()
    arguments = {"batch": batch, "loss": F.cross_entropy, **change}
    with pytest.raises(PrunekitError, match=said):
        replay(sparse, model, OPTIMIZERS["sgd"](model), folder=tmp_path / "again", **arguments)


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "t", model, optimizer) as recorder:
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        recorder.average({})
    with pytest.raises(UsageError, match="step 0 has no sample indices"):
        replay(Trajectory(tmp_path / "t"), TinyNet(), optimizer, batch, F.cross_entropy, tmp_path / "again")
