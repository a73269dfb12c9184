"""Which samples a loader's sampler leaves are those of the split; a sampler that does not settle it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from prunekit import UsageError
from prunekit.data.splits import Split
from prunekit.verbs.checks import told_on_itself

DATA = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 4, "shuffle": True, "drop_last": True}, list(range(10))),
        ({"batch_size": 4, "sampler": SubsetRandomSampler([5, 2, 7])}, [2, 5, 7]),
        ({"batch_size": 4, "sampler": [1, 3, 8]}, [1, 3, 8]),
        ({"batch_sampler": [[0, 1], [6]]}, [0, 1, 6]),
    ],
)
def test_a_sampler_chooses_the_samples(options: dict[str, Any], expected: list[int]) -> None:
    split = Split(loader(**options))
    assert split.batch(range(len(split)))[1].tolist() == expected


@pytest.mark.parametrize(
    "sampler", [WeightedRandomSampler(torch.arange(10.0), 10), RandomSampler(DATA, num_samples=4), [1, 1, 2]]
)
def test_a_sampler_that_settles_nothing_is_refused(sampler: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match="more than once, or others each time"):
        Split(loader(sampler=sampler))
    assert torch.equal(before, torch.get_rng_state())


def test_splits_that_are_the_same_samples_are_told() -> None:
    held = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    other = held[0], held[1].flip(0)
    copied = held[0].clone(), held[1].clone()

    def told(validation: Any, test: Any) -> list[str]:
        return told_on_itself({"train": Split(held), "validation": Split(validation), "test": Split(test)})

    assert told(other, other) == []
    assert [note.split(" and ")[0] for note in told(other, copied)] == ["note: the test"]
    assert [note.split(" and ")[0] for note in told(held, other)] == ["note: the validation"]
    halves = {"train": [0, 1, 2, 3], "validation": [4, 5], "test": [6, 7]}
    loaders = {name: Split(loader(sampler=where)) for name, where in halves.items()}
    assert told_on_itself(loaders) == []
    assert len(told_on_itself({**loaders, "test": Split(loader(sampler=halves["train"]))})) == 1
