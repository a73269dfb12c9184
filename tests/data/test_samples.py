"""Samples are fetched by index, in any grouping; what identifies them is all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from prunekit import UsageError
from prunekit.batch import named, size, taken
from prunekit.data import Samples, Split, drawn, identity, learn_and_accept
from prunekit.task import Classification

PAIR = Classification().batch


class Items(Dataset[Any]):
    """Sample ``i`` is a row of ``x`` and of ``y``; every look at one is counted."""

    def __init__(self, count: int = 23, flipped: int = -1, noise: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(count, 3, generator=generator), torch.arange(count) % 4
        if flipped >= 0:
            self.y[flipped] = (self.y[flipped] + 1) % 4
        self.noise, self.looked = noise, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.looked += 1
        return self.x[i] + (torch.rand(()) if self.noise else 0), int(self.y[i])


class Columns:
    """What ``datasets.Dataset`` is to those who know nothing of it: ``len`` and items that are mappings of lists."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.texts[i], "label": len(self.texts[i]) % 2}


def whole(samples: Samples) -> tuple[Tensor, Tensor]:
    parts = list(samples)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_every_way_to_take_samples_is_indexing() -> None:
    items = Items()
    for samples in (Samples.of(items, PAIR, 5), Samples.held(list(zip(items.x.split(6), items.y.split(6), strict=True)))):
        assert len(samples) == 23
        assert torch.equal(whole(samples)[0], items.x)
        assert torch.equal(samples.rows(4, 13)[0], items.x[4:13])
        where = [22, 3, 3, 11]
        x, y = whole(samples.take(where, 2))
        assert torch.equal(x, items.x[where])
        assert torch.equal(y, items.y[where])
        assert torch.equal(whole(samples.first(7))[0], items.x[:7])
        mask = items.y == 1
        assert torch.equal(whole(samples.where(mask))[1], items.y[mask])
        assert [size(x) for x, _ in samples.bounded(2)][:3] == [2, 2, 1 if samples.groups[0] == range(5) else 2]
        beside = samples.beside(torch.arange(23))
        assert torch.equal(torch.cat([rows for _, (_, rows) in beside]), torch.arange(23))
        learn, accept = learn_and_accept(samples, None, drawn(samples, 0.25, 0), "it")
        assert len(learn) + len(accept) == 23
        assert len(accept) == 6
        both = torch.cat([whole(learn)[0], whole(accept)[0]])
        assert {tuple(row.tolist()) for row in both} == {tuple(row.tolist()) for row in items.x}


def test_nothing_is_looked_at_before_it_is_asked_for() -> None:
    items = Items()
    samples = Samples.of(items, PAIR, 5)
    assert items.looked == 0
    samples.batch(1)
    assert items.looked == 5
    samples.rows(0, 1)
    assert items.looked == 6


@pytest.mark.parametrize("flipped", [0, 7, 22])
def test_a_changed_label_is_noticed_wherever_it_is(flipped: int) -> None:
    assert Split(Items(), PAIR).digest() != Split(Items(flipped=flipped), PAIR).digest()
    pair = Items(), Items(flipped=flipped)
    held = [Split((items.x, items.y), PAIR).digest() for items in pair]
    assert held[0] != held[1]


def test_the_identity_does_not_depend_on_the_grouping() -> None:
    items = Items()
    digests = {Samples.of(items, PAIR, most).digest() for most in (1, 5, 23, 100)}
    assert len(digests) == 1
    assert Samples.held([(items.x, items.y)]).digest() in digests


def test_the_identity_of_many_samples_is_that_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    items = Items()
    held = Split((items.x, items.y), PAIR).digest()
    monkeypatch.setattr(identity, "HELD", items.y.numel() * items.y.element_size())  # less than the inputs take
    assert Samples.of(items, PAIR, 5).digest() == Samples.held([(items.x, items.y)]).digest()
    monkeypatch.setattr(identity, "HELD", 0)  # the labels are too many as well: it is another identity, and still one
    others = {Samples.of(Items(flipped=i), PAIR, 5).digest() for i in range(5)}
    assert len(others) == 5
    assert held not in others


def test_a_fingerprint_stands_for_what_it_names() -> None:
    items = Items()
    split = Split(items, PAIR, fingerprint="v1")
    assert split.identity == "fingerprint"
    digest = split.digest()
    assert items.looked == 0
    assert Split(Items(flipped=3), PAIR, fingerprint="v1").digest() == digest  # the user's word is taken
    assert Split(items, PAIR, fingerprint="v2").digest() != digest
    assert Split(items, PAIR).identity == "content"


def test_samples_that_change_from_look_to_look_are_refused() -> None:
    with pytest.raises(UsageError, match="differs when the same samples are read twice"):
        Split(Items(noise=True), PAIR).digest()


def test_a_loaders_data_set_collate_and_subset_are_taken() -> None:
    items = Items()
    loader = DataLoader(items, batch_size=4, shuffle=True, collate_fn=lambda rows: {"x": torch.stack([x for x, _ in rows])})
    inputs, labels = Split(loader, PAIR).batch([2, 0])
    assert torch.equal(inputs["x"], items.x[[2, 0]])
    assert labels is None
    subset = Split(DataLoader(items, sampler=SubsetRandomSampler([5, 1, 9])), PAIR)
    assert len(subset) == 3
    assert torch.equal(subset.batch(range(3))[0], items.x[[1, 5, 9]])


def test_items_that_are_mappings_of_lists_become_tensors_or_ask_for_collate() -> None:
    even = Split(Columns([[1, 2], [3, 4], [5, 6]]), PAIR)
    inputs, labels = even.batch([0, 2])
    assert named(inputs)["input_ids"].tolist() == [[1, 2], [5, 6]]
    assert labels.tolist() == [0, 0]
    with pytest.raises(UsageError, match="'input_ids' has rows of different lengths; give a collate"):
        Split(Columns([[1], [2, 3]]), PAIR).batch([0, 1])

    def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        return {"input_ids": ids, "labels": torch.tensor([row["label"] for row in rows])}

    uneven = Split(Columns([[1], [2, 3], [4, 5, 6]]), PAIR, collate=padded)
    assert uneven.batch([0, 2])[0]["input_ids"].tolist() == [[1, 0, 0], [4, 5, 6]]
    assert len(uneven.digest()) == 32


def test_shared_tensors_stay_whole() -> None:
    batch = {"x": torch.randn(6, 2), "table": torch.randn(9, 2), "scale": torch.tensor(2.0), "name": "text"}, torch.arange(6)
    inputs, labels = taken(batch, [4, 1])
    assert torch.equal(inputs["x"], batch[0]["x"][[4, 1]])
    assert torch.equal(inputs["table"], batch[0]["table"])
    assert inputs["name"] == "text"
    assert labels.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([1, 2, 3], "must be"),
        ("text", "must be"),
        ((torch.ones(3), torch.ones(2)), "not one each a sample"),
        ((torch.ones(0, 2), torch.ones(0)), "is empty"),
        ({}, "must be"),
    ],
)
def test_what_is_no_split_is_refused(source: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Split(source, PAIR)


def test_a_data_set_that_fails_or_lies_says_where() -> None:
    class Failing(Items):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            if i == 7:
                raise RuntimeError("no such picture")
            return super().__getitem__(i)

    with pytest.raises(UsageError, match=r"reading samples \[6, 7\]… failed: RuntimeError: no such picture"):
        Split(Failing(), PAIR).batch([6, 7])
    with pytest.raises(UsageError, match="collating 2 samples gave inputs"):
        Split(Items(), PAIR, collate=lambda rows: (torch.ones(1, 3), torch.zeros(1))).batch([0, 1])
