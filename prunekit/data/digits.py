"""Real handwritten digits: 1,797 images of 8×8 pixels that come inside scikit-learn (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from prunekit.errors import UsageError

CLASSES = 10


def digits(seed: int = 0, test: int = 360, validation: int = 270, scoring: int = 160) -> dict[str, tuple[Tensor, Tensor]]:
    """Disjoint splits, each with every class in its share; pixels scaled to [0, 1], ``(samples, 1, 8, 8)``.

    Args:
        seed: shuffles before splitting.
        test, validation, scoring: sizes; the rest is for training.

    Raises:
        UsageError: the sizes leave fewer than 100 training samples.
    """
    x, y = _all()
    if min(test, validation, scoring) < CLASSES or len(x) - test - validation - scoring < 100:
        raise UsageError(
            f"digits: test {test}, validation {validation} and scoring {scoring} must be at least {CLASSES} each and "
            f"leave 100 of {len(x)} samples for training"
        )
    return {name: (x[part], y[part]) for name, part in _split(seed, test, validation, scoring).items()}


@cache
def _all() -> tuple[Tensor, Tensor]:
    """Every image and its digit; read from the file once in a process, and copied into each split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return x, torch.tensor(bunch.target, dtype=torch.int64)


@cache
def _split(seed: int, test: int, validation: int, scoring: int) -> dict[str, list[int]]:
    """Which images are in which split."""
    from sklearn.model_selection import train_test_split

    _, y = _all()
    rest, parts = list(range(len(y))), {}
    for name, size in (("test", test), ("validation", validation), ("scoring", scoring)):
        rest, part = train_test_split(rest, test_size=size, random_state=seed, stratify=y[rest].tolist())
        parts[name] = part
    return {"train": rest, **parts}
