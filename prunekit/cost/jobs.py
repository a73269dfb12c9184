"""What each job is to one worker of ``workers`` that share the samples (``prunekit.ranks``).

A few constants count how often the code goes over the weights, and what stands beside them; ``benchmarks/scale.py`` holds what
they predict against what is measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

from prunekit.cost.model import SINGLE, Shape
from prunekit.cost.work import Work, exchanged

GRADIENT = 5 * SINGLE
"""Bytes moved a weight where one sample's gradient of one target is formed and added, scaled, to its score."""
PIECE = 32 * SINGLE
"""Bytes moved a weight to make a piece of the path of two states and what the optimizer's rule keeps."""
LEARNT = 14 * SINGLE
"""Bytes moved a weight by a step of learning: masks, scores, moments, threshold."""
ADAM = 10 * SINGLE
"""Bytes moved a weight by a step of AdamW."""
BESIDE = 1.0
"""What a step of learning does to scores, masks and moments, in starts of a forward and a backward pass."""
ROUND = 5
"""As many such steps a round of swaps takes beside its passes: selections among all weights, and what is offered and kept."""
ENGINE = 1.4
"""Starts of a backward pass that gives every sample's own gradient, in starts of one that gives their sum: each layer's hooks."""
ESTIMATED = 8
"""Samples and pieces, at most, on which the error of scores is estimated, with once and twice the nodes."""
LIBRARIES = 12e6
"""Bytes that kernels and their workspaces take when they are first used."""
COMPARED = 13
"""Sets of the weights that stand while scores with once and twice the nodes, and gradients by two engines, are compared."""
FLAT = 12 * SINGLE
"""Bytes a weight of a repair's flat states, factors, gradients and their sums."""
EXCHANGE, PIECES = 6 * SINGLE, 25e6
"""Bytes a weight that stand where workers add up, what is sent and what comes; once more as pieces, of which there are few."""
SORTED = 600 * SINGLE
"""What a round of swaps takes to rank all weights, as bytes moved a weight: a few sorts."""
MAPPED = 32 * 2**20
"""Bytes from which memory is taken from the system each time, and given back (glibc's largest threshold of ``mmap``)."""
FLATS = 8
"""Vectors of all weights that a piece of the path takes anew: two states, their difference, the optimizer's parts of it."""
SELECTION = 3 * SINGLE
"""Bytes a weight that stand while the weights that stay are found among all."""
BACKWARD = 2.0
"""What stands while a backward pass goes on, in what its forward pass kept: gradients of activations come beside them."""
CHOSEN = 256e6
"""Bytes of single samples' gradients in work, at most, where an engine is chosen or squares are summed (``kernel.gradients``)."""
DOUBLE = 8


def _own(samples: float, workers: int) -> float:
    """The largest share."""
    return math.ceil(samples / workers)


def _passes(samples: float, *, back: float = 1.0, often: float = 1.0) -> Work:
    """Passes of so many samples together, forwards and ``back`` times backwards."""
    return Work(forward=often * samples, backward=often * back * samples, forwards=often, backwards=often * back)


def _chosen(shape: Shape, samples: float, targets: int = 1) -> Work:
    """An engine of single samples' gradients chosen: held against autograd one by one on two samples, in sum on all."""
    few = min(2.0, samples)
    one_by_one = _passes(1, back=targets, often=few)
    looks = _passes(few, back=0, often=3).then(_passes(1, back=0)).then(_passes(samples, back=0))
    engine = _singly(shape, few, targets).then(_singly(shape, samples, targets))
    return one_by_one.then(looks).then(engine).then(_passes(samples))


def _singly(shape: Shape, samples: float, targets: int = 1, often: float = 1.0) -> Work:
    """Every sample's own gradient of every target, added to what is kept of it."""
    once = replace(_passes(samples, back=targets), swept=samples * targets * GRADIENT * shape.parameters)
    return replace(once, backwards=ENGINE * targets).times(often)


def _exchanging(shape: Shape, workers: int) -> float:
    all_ = EXCHANGE * shape.prunable
    return (all_ + min(all_, PIECES)) * (workers > 1)


def _beside(steps: float) -> Work:
    return Work(forwards=BESIDE * steps, backwards=BESIDE * steps)


def evaluate(shape: Shape, samples: int, batch: int = 64, workers: int = 1) -> Work:
    """Outputs of so many samples."""
    own = _own(samples, workers)
    memory = {"model": SINGLE * shape.parameters}
    return Work(forward=own, forwards=math.ceil(own / batch), memory=memory)


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
    chunks = own / together
    walks = math.ceil(chunks) * pieces
    work = _chosen(shape, min(own, chunk), targets).then(_passes(min(own, chunk), back=0))
    work = work.then(_singly(shape, together, targets, often=chunks * pieces * nodes))
    if checked:
        some = _own(min(ESTIMATED, samples), workers)
        work = work.then(_chosen(shape, some, targets).times(2))
        work = work.then(_singly(shape, some, targets, often=3 * nodes * min(ESTIMATED, pieces)))
        walks += 2 * min(ESTIMATED, pieces) * math.ceil(some / together)
    kept = DOUBLE * (shape.prunable + samples * targets * shape.axes)
    return replace(
        work,
        swept=work.swept + walks * PIECE * shape.parameters,
        fresh=walks * FLATS * each * (each > MAPPED),
        read=2 * walks * each,
        wire=exchanged(kept, workers),
        exchanges=4.0,
        setups=1.0,
        memory={
            "model": 2 * each,
            "states": 4 * each,
            "scores in work": min(memory, 2 * together * targets * each),
            "scores": kept / 2,
            "exchange": _exchanging(shape, workers),
            "error estimate": COMPARED * each * checked,
            "activations": BACKWARD * min(own, chunk) * shape.kept,
            "libraries": LIBRARIES,
        },
    )


def gradients(shape: Shape, samples: int, batch: int, workers: int = 1) -> Work:
    """Criteria by gradients of whole batches, at the trained weights."""
    own = _own(samples, workers)
    often = math.ceil(own / batch)
    return replace(
        _passes(own / often, often=often),
        swept=often * 3 * SINGLE * shape.parameters,
        wire=exchanged(DOUBLE * shape.parameters, workers),
        exchanges=1.0,
        setups=1.0,
        memory={
            "model": 2 * SINGLE * shape.parameters,
            "gradients": 2 * SINGLE * shape.parameters,
            "activations": BACKWARD * min(batch, own) * shape.kept,
            "libraries": LIBRARIES,
        },
    )


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
    judging = _own(judged, workers)
    judge = _passes(own, back=0, often=2 * (looks + 1) * judging / own)
    again = _passes(own, back=0, often=steps * (1 + checkpointing))
    work = _passes(own, often=steps).then(again).then(judge).then(_beside(steps))
    return replace(
        work,
        swept=steps * LEARNT * shape.prunable,
        wire=steps * exchanged(SINGLE * shape.prunable, workers),
        exchanges=2.0 * steps,
        setups=1.0,
        memory={
            "model": SINGLE * shape.parameters,
            "mask in work": bytes_a_weight * shape.prunable + SINGLE * (shape.parameters - shape.prunable),
            "selection": SELECTION * shape.prunable,
            "exchange": _exchanging(shape, workers),
            "activations": (BACKWARD + 0.5) * own * kept,  # the dense outputs too
            "libraries": LIBRARIES,
        },
    )


def tune(shape: Shape, *, steps: int, batch: int, workers: int = 1) -> Work:
    """Weights trained by the divergence from the dense model: its outputs, the pruned one's and their gradient, AdamW's step."""
    own = _own(batch, workers)
    return replace(
        _passes(own, often=steps).then(_passes(own, back=0, often=steps)),
        swept=steps * ADAM * shape.parameters,
        wire=steps * exchanged(SINGLE * shape.parameters, workers),
        exchanges=float(steps),
        setups=1.0,
        memory={
            "model": 2 * SINGLE * shape.parameters,
            "weights in work": 4 * SINGLE * shape.parameters,  # gradients, two moments, the state that is recorded or the best
            "activations": (BACKWARD + 0.5) * own * shape.kept,
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
    by_blame = math.ceil(rounds / 2)
    batches = steps + by_blame * nodes + (rounds - by_blame)
    looks = 1 + steps / every + rounds
    gradients_ = _passes(own, often=batches).then(_chosen(shape, own).times(2)).then(_singly(shape, own, often=1 + rounds))
    learnt = _passes(own, back=0, often=1 + looks + 2 * by_blame)
    work = gradients_.then(learnt).then(_passes(judged, back=0, often=1 + looks)).then(_beside(steps + ROUND * rounds))
    return replace(
        work,
        swept=work.swept + shape.parameters * (steps * LEARNT + (1 + rounds) * PIECE) + shape.prunable * rounds * SORTED,
        wire=exchanged(SINGLE * shape.prunable, workers) * batches + exchanged(DOUBLE * shape.prunable, workers) * (1 + rounds),
        exchanges=2 * batches + 1 + rounds + 2 * looks,
        setups=1.0,
        memory={
            "model": 2 * SINGLE * shape.parameters,
            "mask in work": 16.0 * shape.prunable,
            "flat": FLAT * shape.parameters,
            "exchange": _exchanging(shape, workers),
            "scores in work": min(CHOSEN, 2 * own * SINGLE * shape.parameters),
            "activations": BACKWARD * own * shape.kept,
            "libraries": LIBRARIES,
        },
    )


def counterfactual(shape: Shape, *, steps: int, batch: int, retrained: int = 1, workers: int = 1) -> Work:
    """Trained again without something, ``retrained`` times: models are dealt out, so that nothing goes over the wire."""
    one = replace(
        _passes(batch, often=steps),
        swept=steps * ADAM * shape.parameters,
        memory={
            "model": 5 * SINGLE * shape.parameters,  # gradients, two moments, and what a step makes of them
            "activations": BACKWARD * batch * shape.kept,
            "libraries": LIBRARIES,
        },
    )
    return one.times(_own(retrained, workers))
