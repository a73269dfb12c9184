"""What a model of the zoo is: its factory, its data, its task; and small made-up data of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZES = {"train": 16, "validation": 8, "test": 8, "scoring": 6}
CLASSES = 4
STEPS = (
    "import", "record", "taylor", "fisher", "influence", "wanda", "unstructured", "2:4", "channels", "heads", "layers", "refine",
    "eval", "load", "explain",
)  # fmt: skip

NO_ATTENTION = {"heads": "it has no attention"}
NO_BLOCKS = {"layers": "it has no stack of blocks of one shape"}
NO_LOSS = {
    "record": "there is no loss to train with",
    "taylor": "there is no loss to look at",
    "fisher": "there is no loss to look at",
    "influence": "there is no path without training",
}


@dataclass(frozen=True)
class Entry:
    """One model, as its user would bring it.

    Attributes:
        build: the model factory; seeded by whoever calls it.
        data: the data factory: the four splits.
        task: the task's name; ``options`` of it, such as which of several outputs counts.
        loss: an import path, where the task's own loss is not meant.
        senseless: step -> why it makes no sense for this model. Such a cell may be refused and is not counted.
        packages: what has to be installed.
        fast: belongs to the selection that ``make test`` runs.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], Mapping[str, Any]]
    task: str = "classification"
    loss: str | None = None
    senseless: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[str] = ()
    fast: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, Any]:
        """The task as a recipe has it."""
        return {"name": self.task, **self.options}


class Rows(Dataset[Any]):
    """A map-style data set whose samples are nests: ``columns`` is a nest of tensors with samples on their first axis."""

    def __init__(self, columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        first = self.columns
        while not isinstance(first, Tensor):
            first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
        return len(first)

    def __getitem__(self, index: int) -> Any:
        return _row(self.columns, index)


def _row(nest: Any, index: int) -> Any:
    if isinstance(nest, Tensor):
        return nest[index]
    if isinstance(nest, Mapping):
        return {key: _row(value, index) for key, value in nest.items()}
    return tuple(_row(value, index) for value in nest)


def splits(make: Callable[[int, torch.Generator], Any]) -> dict[str, Any]:
    """The four splits, each by ``make(samples, generator)``; nests other than a pair of tensors become data sets."""
    found = {}
    for number, (name, samples) in enumerate(SIZES.items()):
        made = make(samples, torch.Generator().manual_seed(100 + number))
        pair = isinstance(made, tuple) and len(made) == 2 and all(isinstance(t, Tensor) for t in made)
        found[name] = made if pair else Rows(made)
    return found


def images(size: int = 32, channels: int = 3) -> Callable[[], dict[str, Any]]:
    """Pictures ``(n, channels, size, size)`` of ``CLASSES`` classes that differ in their mean."""
    return lambda: splits(lambda n, g: _labelled(torch.randn(n, channels, size, size, generator=g), g))


def vectors(*shape: int) -> Callable[[], dict[str, Any]]:
    """Inputs ``(n, *shape)`` of ``CLASSES`` classes that differ in their mean."""
    return lambda: splits(lambda n, g: _labelled(torch.randn(n, *shape, generator=g), g))


def maps(size: int = 32) -> Callable[[], dict[str, Any]]:
    """Pictures with a class for every pixel: ``(n, size, size)``, a tenth of them left out (-100)."""

    def make(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 3, size, size, generator=g)
        y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        return x, y.masked_fill(torch.rand(y.shape, generator=g) < 0.1, -100)

    return lambda: splits(make)


def tokens(
    labels: str, *, vocabulary: int = 64, length: int = 10, masked: bool = True, names: tuple[str, str] = ("input_ids", "labels")
) -> Callable[[], dict[str, Any]]:
    """Sentences as a tokenizer and its collator give them: mappings with an attention mask, the last words padding.

    Args:
        labels: ``class`` of a sentence; ``token`` a class for each word; ``lm`` the words themselves; ``masked`` those that
            are hidden; ``seq2seq`` the words of another sentence. Padding is -100.
    """

    def make(n: int, g: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(4, vocabulary, (n, length), generator=g)
        lengths = torch.randint(length // 2, length + 1, (n, 1), generator=g)
        mask = (torch.arange(length) < lengths).long()
        ids = ids * mask
        padding = mask == 0
        if labels == "class":
            y = ids[:, 0] % CLASSES
        elif labels == "token":
            y = (ids % CLASSES).masked_fill(padding, -100)
        elif labels == "lm":
            y = ids.masked_fill(padding, -100)
        elif labels == "masked":
            hidden = torch.rand(ids.shape, generator=g) < 0.3
            hidden[:, 0] = True
            y = ids.masked_fill(~hidden | padding, -100)
            ids = ids.masked_fill(hidden & ~padding, 3)
        else:
            y = (ids.flip(1) // 2 + 2)[:, : length // 2]
        return {names[0]: ids, **({"attention_mask": mask} if masked else {}), names[1]: y}

    return lambda: splits(make)


def _labelled(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, CLASSES, (len(x),), generator=g)
    return x + 0.5 * y.view(-1, *[1] * (x.dim() - 1)), y
