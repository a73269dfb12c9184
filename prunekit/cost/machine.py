"""What a machine does in a second, measured here with the model that it is asked about, or taken from its data sheet."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

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
        read: bytes a second from the disk.
        wire: bytes a second that leave a worker.
        wait: seconds that an exchange takes beside its bytes.
    """

    forward: float
    backward: float
    sweep: float
    read: float = 1e9
    wire: float = 1e9
    wait: float = 1e-4

    @classmethod
    def here(
        cls,
        shape: Shape,
        forward: Callable[[], Any],
        forwarded: int,
        both: Callable[[], Any],
        differentiated: int,
    ) -> Machine:
        """Measured, on the CPU.

        Args:
            forward: passes ``forwarded`` samples without a graph.
            both: passes ``differentiated`` samples forwards and backwards.
        """
        one, two = _seconds(forward) / forwarded, _seconds(both) / differentiated
        done = 2 * max(1.0, shape.macs)
        big = torch.zeros(SWEPT)
        other = torch.empty_like(big)
        return cls(
            forward=done / one,
            backward=2 * done / max(two - one, 0.5 * one),
            sweep=2 * big.nbytes / _seconds(lambda: other.copy_(big)),
            read=_read(),
        )

    def mean(self, other: Machine) -> Machine:
        """Half of the time at these rates, half at the other's: one that others use too is measured before and after."""
        return Machine(*(2 / (1 / a + 1 / b) for a, b in zip(astuple(self), astuple(other), strict=True)))


def _seconds(work: Callable[[], Any]) -> float:
    """The median of a few calls after one that warms up."""
    found = []
    for number in range(ROUNDS + 1):
        begun = time.perf_counter()
        work()
        if number:
            found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _read() -> float:
    """Bytes a second of a file that was just written, as the states of a path mostly are."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(2**20) * 32)
        file.flush()

        def read() -> None:
            file.seek(0)
            torch.frombuffer(bytearray(file.read()), dtype=torch.float32)

        return 2**25 / _seconds(read)
