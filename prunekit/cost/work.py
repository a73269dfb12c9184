"""How much there is to do: passes of samples, bytes that go over all weights, bytes over the wire, and what stands in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from prunekit.cost.machine import Machine
from prunekit.cost.model import Shape

SETUP = 0.2
"""Seconds before the first sample: copies of the model, checks of its answers; measured on models where nothing else counts."""


@dataclass(frozen=True)
class Work:
    """What one worker does.

    Attributes:
        forward, backward: passes, in samples; a backward pass of several targets counts each.
        forwards, backwards: passes, however many samples go together.
        swept: bytes moved in memory by what goes over all weights.
        fresh: bytes newly taken from the system.
        read: bytes from the disk.
        wire: bytes that leave this worker.
        exchanges: how often all workers wait for each other.
        setups: how often ``SETUP`` is taken.
        memory: bytes by what they are for.
    """

    forward: float = 0.0
    backward: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    swept: float = 0.0
    fresh: float = 0.0
    read: float = 0.0
    wire: float = 0.0
    exchanges: float = 0.0
    setups: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, shape: Shape, machine: Machine) -> float:
        """How long it takes, one after the other: nothing is counted on to overlap."""
        return (
            self.forward * 2 * shape.macs / machine.forward
            + self.backward * 4 * shape.macs / machine.backward
            + self.forwards * machine.start_forward
            + self.backwards * machine.start_backward
            + self.setups * SETUP
            + self.swept / machine.sweep
            + self.fresh / machine.fresh
            + self.read / machine.read
            + (self.wire / machine.wire + self.exchanges * machine.wait if self.wire else 0.0)
        )

    @property
    def bytes(self) -> float:
        """All that stands in memory at once."""
        return sum(self.memory.values())

    def times(self, count: float) -> Work:
        """The same, so often, one after the other."""
        return replace(self, **{name: count * getattr(self, name) for name in COUNTED})

    def then(self, other: Work) -> Work:
        """One after the other."""
        memory: Mapping[str, float] = {
            key: max(self.memory.get(key, 0.0), other.memory.get(key, 0.0)) for key in {**self.memory, **other.memory}
        }
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in COUNTED}, memory=memory)


COUNTED = tuple(each.name for each in fields(Work) if each.name != "memory")


def exchanged(bytes_: float, workers: int) -> float:
    """Bytes that a worker sends where ``bytes_`` are added up over all: a ring sends each part on, twice round but one.

    Example:
        >>> from prunekit.cost.work import exchanged
        >>> [exchanged(100, workers) for workers in (1, 2, 4)]
        [0.0, 100.0, 150.0]
    """
    return 2 * (workers - 1) / workers * bytes_
