"""A watched loader: what is noted of each step is what the loop saw, whatever draws the batches."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)  # fmt: skip

from prunekit import Recorder, Trajectory, UsageError
from prunekit.errors import Note

COUNT = 22


class Numbers(Dataset[Tensor]):
    """Sample k is the number k: what the loop saw is told by the inputs themselves."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: Any) -> Tensor:
        return torch.as_tensor(index, dtype=torch.float32)[..., None]


DATA = Numbers()
LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(DATA, 4),
    "shuffled": lambda: DataLoader(DATA, 4, shuffle=True),
    "without the last": lambda: DataLoader(DATA, 4, shuffle=True, drop_last=True),
    "its own generator": lambda: DataLoader(DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(7)),
    "weighted": lambda: DataLoader(DATA, 5, sampler=WeightedRandomSampler([1.0] * COUNT, 15)),
    "its own batches": lambda: DataLoader(DATA, batch_sampler=[[3, 1], [2], [0, 21, 5]]),
    "many at once": lambda: DataLoader(DATA, None, sampler=BatchSampler(RandomSampler(DATA), 4, False)),
    "one by one": lambda: DataLoader(DATA, None, sampler=RandomSampler(DATA, num_samples=5)),
    "a part": lambda: DataLoader(Subset(DATA, range(COUNT)), 4, shuffle=True),
}


def loop(folder: Path, loader: Any, body: Callable[[Any, Tensor, int], bool], epochs: int = 2) -> list[list[list[int]]]:
    """What was noted of each step; ``body(optimizer, loss, number of the batch)`` says whether to step."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    torch.manual_seed(0)
    with Recorder(folder, model, optimizer, snapshot_every=0) as recorder:
        for _ in range(epochs):
            for number, x in enumerate(recorder.watch(loader)):
                if body(optimizer, model(x).square().mean(), number):
                    optimizer.step()
    trajectory = Trajectory(folder)
    return [[list(b) for b in trajectory.step(s).batches or ()] for s in range(len(trajectory))]


def plain(optimizer: Any, loss: Tensor, number: int) -> bool:
    optimizer.zero_grad()
    loss.backward()
    return True


def numbers(x: Tensor) -> list[int]:
    return x.flatten().int().tolist()


@pytest.mark.parametrize("name", LOADERS)
def test_each_step_has_the_samples_of_its_batch(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    loader = LOADERS[name]()
    expected = [[numbers(x)] for _ in range(2) for x in loader]
    assert loop(tmp_path / "t", LOADERS[name](), plain) == expected  # the batches that come without watching


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_fetch_ahead_and_keep_the_order(tmp_path: Path, persistent: bool) -> None:
    """Two workers are started once or twice: this takes a second."""
    loader = DataLoader(DATA, 4, shuffle=True, num_workers=2, persistent_workers=persistent, prefetch_factor=3)
    seen: list[list[list[int]]] = []
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with Recorder(tmp_path / "t", model, optimizer, snapshot_every=0) as recorder:
        for epoch in range(2):
            for number, x in enumerate(recorder.watch(loader)):
                if epoch == 0 and number == 2:
                    break  # what was drawn ahead is another iteration's, and not noted in the next
                plain(optimizer, model(x).square().mean(), 0)
                optimizer.step()
                seen.append([numbers(x)])
    trajectory = Trajectory(tmp_path / "t")
    assert [[list(b) for b in trajectory.step(s).batches or ()] for s in range(len(trajectory))] == seen
    assert len(seen) == 2 + 6


def test_a_loader_goes_when_its_loop_lets_it_go(tmp_path: Path) -> None:
    """Not when garbage is collected, by which time its workers can only be waited for."""
    loader = DataLoader(DATA, 4)
    gone = weakref.ref(loader)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    gc.disable()
    try:
        with Recorder(tmp_path / "t", model, optimizer) as recorder:
            for x in recorder.watch(loader):
                plain(optimizer, model(x).square().mean(), 0)
                optimizer.step()
        del loader
        assert gone() is None
    finally:
        gc.enable()


def test_accumulated_gradients_are_of_all_their_batches(tmp_path: Path) -> None:
    def body(optimizer: Any, loss: Tensor, number: int) -> bool:
        if number % 2 == 0:
            optimizer.zero_grad()
        (loss / 2).backward()
        return number % 2 == 1

    assert loop(tmp_path / "t", DataLoader(DATA, 4), body, epochs=1) == [
        [[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]], [[16, 17, 18, 19], [20, 21]],
    ]  # fmt: skip


@pytest.mark.parametrize("when", ["before its gradient", "after its gradient", "only looked at"])
def test_skipped_batches_belong_to_no_step(tmp_path: Path, when: str) -> None:
    def body(optimizer: Any, loss: Tensor, number: int) -> bool:
        optimizer.zero_grad()
        if number in (1, 2):
            if when == "after its gradient":
                loss.backward()
            return False
        loss.backward()
        return True

    found = loop(tmp_path / "t", DataLoader(DATA, 5), body, epochs=1)
    assert found == [[[0, 1, 2, 3, 4]], [[15, 16, 17, 18, 19]], [[20, 21]]]


def test_what_the_loop_says_itself_counts(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with Recorder(tmp_path / "t", model, optimizer) as recorder:
        for x in recorder.watch(DataLoader(DATA, 11)):
            recorder.batch(numbers(x), seed=5)
            plain(optimizer, model(x).square().mean(), 0)
            optimizer.step()
    step = Trajectory(tmp_path / "t").step(1)
    assert step.batches == (tuple(range(11, 22)),)
    assert step.seeds == (5,)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.zeros(4, 1))


def test_what_cannot_be_watched_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with Recorder(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1)) as recorder:
        with pytest.raises(UsageError, match="Stream is an iterable data set"):
            recorder.watch(DataLoader(Stream()))
        with pytest.raises(UsageError, match="takes a DataLoader, not a list"):
            recorder.watch([1, 2])  # type: ignore[arg-type]
        loader = DataLoader(DATA, 4)
        assert recorder.watch(loader) is recorder.watch(loader)
        assert len(recorder.watch(loader)) == 6
        with pytest.raises(UsageError, match="two data sets"):
            recorder.watch(DataLoader(Numbers(), 4))
        with pytest.raises(UsageError, match="draws"):
            next(iter(recorder.watch(DataLoader(DATA, batch_sampler=[["a"]]))))  # type: ignore[list-item]
        shards: DataLoader[Any] = DataLoader(DATA, 8, sampler=DistributedSampler(DATA, num_replicas=2, rank=0))
        with pytest.raises(UsageError, match="deals samples out to 2 processes, and 1 record"):
            recorder.watch(shards)


def test_a_step_without_samples_is_told_of_once(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with warnings.catch_warnings(record=True) as said, Recorder(tmp_path / "t", model, optimizer):
        warnings.simplefilter("always")
        for _ in range(3):
            plain(optimizer, model(torch.ones(2, 1)).mean(), 0)
            optimizer.step()
    assert [w.category for w in said] == [Note]
    assert "recorder.watch(loader)" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(tmp_path / "noted", DataLoader(DATA, 4), plain)
