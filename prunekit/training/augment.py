"""Random changes to training inputs, drawn from a seed a batch that the recorder keeps: every batch can be made again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.batch import Batch, Inputs

Augment = Callable[[Inputs, torch.Generator], Inputs]
"""``(inputs (samples, ...), generator)`` -> the changed inputs; every random draw from ``generator``."""


def horizontal_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image ``(samples, channels, height, width)`` left to right with probability one half."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)


AUGMENTATIONS: dict[str, Augment] = {"horizontal_flip": horizontal_flip}


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's augmentation, its own for every step of every run with ``seed`` and ``step`` below 2^31."""
    return (seed << 31) | step


def augmented(batch: Callable[[Tensor], Batch], augment: Augment) -> Callable[..., Batch]:
    """``(indices, seed)`` -> the batch as a step that recorded ``seed`` saw it, as ``prunekit.kernel.data_scores`` asks for it.

    Without a seed: the samples as they are stored.
    """

    def made_again(indices: Tensor, seed: int | None = None) -> Batch:
        x, y = batch(indices)
        return (x if seed is None else augment(x, torch.Generator().manual_seed(seed))), y

    return made_again
