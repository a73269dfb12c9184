"""Which samples a loader's sampler leaves are those of the split; a sampler that does not settle it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from prunekit import UsageError
from prunekit.data.splits import Split

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
