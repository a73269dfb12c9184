"""How much there is to do: passes of samples, bytes that go over all weights, bytes over the wire, and what stands in memory.

Everything is of one worker of ``workers`` that share the samples (``prunekit.ranks``). A few constants count how often the code
goes over the weights; ``benchmarks/scale.py`` holds what they predict against what is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from prunekit.cost.machine import Machine
from prunekit.cost.model import SINGLE, Shape

GRADIENT = 5 * SINGLE
"""Bytes moved a weight where one sample's gradient of one target is formed and added, scaled, to its score."""
PIECE = 32 * SINGLE
"""Bytes moved a weight to make a piece of the path of two states and what the optimizer's rule keeps."""
LEARNT = 14 * SINGLE
"""Bytes moved a weight by a step of learning: masks, scores, moments, threshold."""
ADAM = 10 * SINGLE
"""Bytes moved a weight by a step of AdamW."""
CHECKS = 3
"""Passes of every sample by which the engine of gradients is chosen: plain autograd, and the engine's twice."""
ESTIMATED = 8
"""Samples and pieces, at most, on which the error of scores is estimated, with once and twice the nodes; by every worker."""
LIBRARIES = 15e6
"""Bytes that kernels and their workspaces take when they are first used."""
BACKWARD = 2.0
"""What stands while a backward pass goes on, in what its forward pass kept: gradients of activations come beside them."""
CHOSEN = 256e6
"""Bytes of single samples' gradients in work, at most, where an engine is chosen or squares are summed (``kernel.gradients``)."""
DOUBLE = 8


@dataclass(frozen=True)
class Work:
    """What one worker does.

    Attributes:
        forward, backward: passes, in samples; a backward pass of several targets counts each.
        swept: bytes moved in memory by what goes over all weights.
        read: bytes from the disk.
        wire: bytes that leave this worker.
        exchanges: how often all workers wait for each other.
        memory: bytes by what they are for.
    """

    forward: float = 0.0
    backward: float = 0.0
    swept: float = 0.0
    read: float = 0.0
    wire: float = 0.0
    exchanges: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)

    def seconds(self, shape: Shape, machine: Machine) -> float:
        """How long it takes, one after the other: nothing is counted on to overlap."""
        return (
            self.forward * 2 * shape.macs / machine.forward
            + self.backward * 4 * shape.macs / machine.backward
            + self.swept / machine.sweep
            + self.read / machine.read
            + (self.wire / machine.wire + self.exchanges * machine.wait if self.wire else 0.0)
        )

    @property
    def bytes(self) -> float:
        """All that stands in memory at once."""
        return sum(self.memory.values())

    def times(self, count: float) -> Work:
        """The same, so often, one after the other."""
        return Work(
            count * self.forward, count * self.backward, count * self.swept, count * self.read, count * self.wire,
            count * self.exchanges, self.memory,
        )  # fmt: skip

    def then(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.forward + other.forward, self.backward + other.backward, self.swept + other.swept, self.read + other.read,
            self.wire + other.wire, self.exchanges + other.exchanges,
            {key: max(self.memory.get(key, 0.0), other.memory.get(key, 0.0)) for key in {**self.memory, **other.memory}},
        )  # fmt: skip


def exchanged(bytes_: float, workers: int) -> float:
    """Bytes that a worker sends where ``bytes_`` are added up over all: a ring sends each part on, twice round but one.

    Example:
        >>> from prunekit.cost.work import exchanged
        >>> [exchanged(100, workers) for workers in (1, 2, 4)]
        [0.0, 100.0, 150.0]
    """
    return 2 * (workers - 1) / workers * bytes_


def _own(samples: float, workers: int) -> float:
    """The largest share."""
    return math.ceil(samples / workers)


def evaluate(shape: Shape, samples: int, workers: int = 1) -> Work:
    """Outputs of so many samples."""
    return Work(forward=_own(samples, workers), memory={"model": SINGLE * shape.parameters})


def score_path(
    shape: Shape,
    *,
    samples: int,
    pieces: int,
    targets: int = 1,
    nodes: int = 1,
    chunk: int = 64,
    memory: float,
    checked: bool = True,
    workers: int = 1,
) -> Work:
    """``influence`` and its kin: every sample's gradient of every target at every piece of the path.

    Args:
        checked: an estimate of the scores' error is made; ``taylor`` and ``fisher`` look at one point, which has none.
        chunk: samples that are scored together, at most; ``memory`` allows fewer.
        memory: bytes for scores in work.
    """
    own = _own(samples, workers)
    each = SINGLE * shape.parameters
    together = max(1.0, min(own, chunk, memory // (3 * each * targets)))
    some = min(ESTIMATED, samples)
    estimate = checked * some * (3 * nodes * min(ESTIMATED, pieces) + 2 * CHECKS)
    passes, walks = own * (pieces * nodes + CHECKS) + estimate, math.ceil(own / together) * pieces
    kept = DOUBLE * (shape.prunable + samples * targets * shape.axes)
    return Work(
        forward=passes,
        backward=passes * targets,
        swept=(passes * targets * GRADIENT + walks * PIECE) * shape.parameters,
        read=2 * walks * each,
        wire=exchanged(kept, workers),
        exchanges=1.0,
        memory={
            "model": 2 * each,
            "states": 4 * each,
            "scores in work": min(memory, 2 * together * targets * each),
            "scores": kept / 2,
            "error estimate": 6.0 * each * checked,
            "activations": BACKWARD * min(own, chunk) * shape.kept,
            "libraries": LIBRARIES,
        },
    )


def gradients(shape: Shape, samples: int, batch: int, workers: int = 1) -> Work:
    """Criteria by gradients of whole batches, at the trained weights."""
    own = _own(samples, workers)
    return Work(
        forward=own,
        backward=own,
        swept=math.ceil(own / batch) * 3 * SINGLE * shape.parameters,
        wire=exchanged(DOUBLE * shape.parameters, workers),
        exchanges=1.0,
        memory={"model": 2 * SINGLE * shape.parameters, "gradients": 2 * SINGLE * shape.parameters,
                "activations": BACKWARD * min(batch, own) * shape.kept, "libraries": LIBRARIES},
    )  # fmt: skip


def learn(
    shape: Shape,
    *,
    steps: int,
    batch: int,
    judged: int = 0,
    looks: int = 10,
    bytes_a_weight: float = 10.0,
    checkpointing: bool = False,
    workers: int = 1,
) -> Work:
    """A mask learnt from a stream: the dense model's outputs, the masked one's, its gradient, the scores' step.

    Args:
        judged: samples that every look is judged on, by the dense model's outputs and the masked one's.
        bytes_a_weight: beside the model, its copy among them.
        checkpointing: blocks are run again in the backward pass, so that only what lies between them is kept.
    """
    own = _own(batch, workers)
    kept = shape.between + shape.kept / shape.blocks if checkpointing else shape.kept
    return Work(
        forward=steps * (2 + checkpointing) * own + 2 * (looks + 1) * _own(judged, workers),
        backward=steps * own,
        swept=steps * LEARNT * shape.prunable,
        wire=steps * exchanged(SINGLE * shape.prunable, workers),
        exchanges=steps,
        memory={
            "model": SINGLE * shape.parameters,
            "mask in work": bytes_a_weight * shape.prunable + SINGLE * (shape.parameters - shape.prunable),
            "activations": (BACKWARD + 0.5) * own * kept,  # the dense outputs too
            "libraries": LIBRARIES,
        },
    )


def refine(
    shape: Shape,
    *,
    samples: int,
    accept: int,
    steps: int = 300,
    rounds: int = 30,
    nodes: int = 8,
    every: int = 5,
    workers: int = 1,
) -> Work:
    """A mask repaired on kept samples: learnt for ``steps`` steps, then ``rounds`` of swaps, all of them."""
    own, judged = _own(samples, workers), _own(accept, workers)
    rounds_of_blame = math.ceil(rounds / 2)
    per_sample = 1 + rounds  # influence of every sample by itself
    whole = steps + rounds_of_blame * nodes + (rounds - rounds_of_blame)
    return Work(
        forward=own * (whole + per_sample) + (own + judged) * (steps / every + rounds),
        backward=own * (whole + per_sample),
        swept=shape.parameters * (per_sample * own * GRADIENT + steps * LEARNT + rounds * PIECE),
        wire=exchanged(SINGLE * shape.prunable, workers) * whole + exchanged(DOUBLE * shape.prunable, workers) * per_sample,
        exchanges=whole + per_sample + steps / every + rounds,
        memory={
            "model": 2 * SINGLE * shape.parameters,
            "mask in work": 16.0 * shape.prunable,
            "scores in work": min(CHOSEN, 2 * own * SINGLE * shape.parameters),
            "activations": (BACKWARD + 1) * own * shape.kept,
            "libraries": LIBRARIES,
        },
    )


def counterfactual(shape: Shape, *, steps: int, batch: int, retrained: int = 1, workers: int = 1) -> Work:
    """Trained again without something, ``retrained`` times: models are dealt out, so that nothing goes over the wire."""
    one = Work(
        forward=steps * batch,
        backward=steps * batch,
        swept=steps * ADAM * shape.parameters,
        memory={
            "model": 6 * SINGLE * shape.parameters,  # gradients, two moments, and what a step makes of them
            "activations": BACKWARD * batch * shape.kept,
            "libraries": LIBRARIES,
        },
    )
    return one.times(_own(retrained, workers))
