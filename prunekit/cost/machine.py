"""What a machine does in a second, measured here with the model that it is asked about, or taken from its data sheet."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit import ranks

if TYPE_CHECKING:
    from prunekit.cost.model import Shape

SWEPT = 2**24
"""Numbers that are copied to see how fast memory is: more than any cache holds."""
ROUNDS = 5


@dataclass(frozen=True)
class Machine:
    """Rates of one worker.

    Attributes:
        forward, backward: floating-point operations a second in forward and backward passes of the model at hand.
        sweep: bytes a second that memory moves, read and written both counted.
        fresh: bytes a second of memory that is newly taken from the system, in pages that it has to clear first.
        read: bytes a second from the disk.
        wire: bytes a second that leave a worker.
        wait: seconds that an exchange takes beside its bytes.
        start_forward, start_backward: seconds of a pass beside its samples: the starts of its kernels, and Python's part.
    """

    forward: float
    backward: float
    sweep: float
    fresh: float = math.inf
    read: float = 1e9
    wire: float = 1e9
    wait: float = 1e-4
    start_forward: float = 0.0
    start_backward: float = 0.0

    @classmethod
    def here(cls, shape: Shape, forward: Callable[[int], Any], both: Callable[[int], Any], batch: int) -> Machine:
        """Measured, on the CPU; by all ranks at once where there are several (``prunekit.ranks``).

        Args:
            forward: passes so many samples, ``batch`` of them or one, without a graph.
            both: passes so many forwards and backwards.
        """
        there, back = _line(forward, batch), _line(both, batch)
        done = 2 * max(1.0, shape.macs)
        big = torch.zeros(SWEPT)
        other = torch.empty_like(big)
        wait = _seconds(lambda: ranks.total(1.0)) if ranks.size() > 1 else cls.wait
        warm = _seconds(lambda: other.copy_(big))
        return cls(
            forward=done / there[1],
            backward=2 * done / max(back[1] - there[1], 0.5 * there[1]),
            sweep=2 * big.nbytes / warm,
            fresh=big.nbytes / max(_seconds(lambda: big.clone()) - warm, 0.1 * warm),
            read=_read(),
            wire=_wire(big, wait) if ranks.size() > 1 else cls.wire,
            wait=wait,
            start_forward=there[0],
            start_backward=max(back[0] - there[0], 0.0),
        )

    def mean(self, other: Machine) -> Machine:
        """Half of the time at these rates, half at the other's: one that others use too is measured before and after."""
        rates = ("forward", "backward", "sweep", "fresh", "read", "wire")
        mine, theirs = asdict(self), asdict(other)
        return Machine(**{name: (_slower if name in rates else _between)(value, theirs[name]) for name, value in mine.items()})


def _seconds(work: Callable[[], Any]) -> float:
    """The median of a few calls after one that warms up."""
    found = []
    for number in range(ROUNDS + 1):
        begun = time.perf_counter()
        work()
        if number:
            found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _slower(a: float, b: float) -> float:
    """The rate of something done half at one rate, half at the other; ∞ is no time at all."""
    return 2 / slow if (slow := 1 / a + 1 / b) else math.inf


def _between(a: float, b: float) -> float:
    return (a + b) / 2


def _line(work: Callable[[int], Any], batch: int) -> tuple[float, float]:
    """Seconds of a pass beside its samples, and of each sample."""
    many = _seconds(lambda: work(batch))
    if batch == 1:
        return 0.0, many
    one = min(_seconds(lambda: work(1)), many)
    each = max((many - one) / (batch - 1), 0.1 * many / batch)
    return max(many - batch * each, 0.0), each


def _wire(big: Tensor, wait: float) -> float:
    """Bytes a second that leave this worker while all add up a tensor that was just made, as gradients are."""
    part = big[: SWEPT // 16]
    took = _seconds(lambda: ranks.adding(part.clone()).wait()) - wait
    return 2 * (ranks.size() - 1) / ranks.size() * part.nbytes / max(took, wait)


def _read() -> float:
    """Bytes a second of a file that was just written, as the states of a path mostly are."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(2**20) * 32)
        file.flush()

        def read() -> None:
            file.seek(0)
            torch.frombuffer(bytearray(file.read()), dtype=torch.float32)

        return 2**25 / _seconds(read)
