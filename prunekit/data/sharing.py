"""A rank's own part of samples: a stretch of them, so that the parts of all ranks in order are the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Batch, size, take
from prunekit.data.samples import Samples
from prunekit.errors import PrunekitError


class Share(NamedTuple):
    """Samples of one rank, which begin at ``begin`` of all."""

    samples: Samples
    begin: int


@contextmanager
def sharing(samples: Samples, whole: bool = False) -> Iterator[Share]:
    """This rank's stretch of the samples; inside, sums over it are to be added up (``prunekit.ranks``).

    Where they cannot be shared, since there are fewer than ranks or they are ``whole``, every rank has all and is alone.
    """
    apart = whole or len(samples) < ranks.size()
    with ranks.apart() if apart else nullcontext():
        if ranks.size() == 1:
            yield Share(samples, 0)
        else:
            part = ranks.stretch(len(samples))
            number = torch.arange(len(samples))
            yield Share(samples.where((number >= part.start) & (number < part.stop)), part.start)


def mixes(answer: Callable[[Batch], Tensor], samples: Samples) -> bool:
    """Whether a sample alone gets another answer than among others, so that ranks may not cut batches; False without others.

    Args:
        answer: of a batch, a row a sample.
    """
    if ranks.size() == 1 or len(samples) < 2:
        return False
    batch = samples.rows(0, 2)
    return not same_alone(answer, batch, answer(batch)[0])


def same_alone(answer: Callable[[Batch], Tensor], batch: Batch, together: Tensor) -> bool:
    """Whether the batch's first sample alone gets the answer ``together`` that it gets among the others."""
    count = size(batch[0])
    try:
        alone = answer((take(batch[0], slice(0, 1)), take(batch[1], slice(0, 1), count)))[0]
    except PrunekitError:
        raise
    except Exception:  # it does not take one sample, whatever it says to it
        return False
    most = float(together.abs().max()) if together.numel() else 0.0
    return alone.shape == together.shape and torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * most, equal_nan=True)
