"""How much each weight contributed along a path: parameter-wise scores, chunk by chunk.

``ψ_i(x) = Σ_s U_{s,i} ∫ ∂_i f(x; θ_s + t D_s) dt`` (ExPLAIND, arXiv 2505.20076, the kernel's parameter-wise form;
docs/kernel.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Inputs, Labels, size, take, to
from prunekit.errors import PrunekitError
from prunekit.kernel.bisection import bisect
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.gradients import GradientEngine, choose_engine
from prunekit.kernel.quadrature import get_rule
from prunekit.trajectory.trajectory import Segment


def _surviving(segment: Segment) -> Tensor:
    if segment.surviving is None:
        raise ValueError("the path's pieces lack surviving; take them from Trajectory.segments(survival=True)")
    return segment.surviving


SHARES: dict[str, Callable[[Segment], Tensor]] = {
    "kernel": lambda segment: segment.data_update,
    "regularisation": lambda segment: segment.regularisation,
    "whole": lambda segment: segment.update,
    "survival": _surviving,
}

SAMPLES_AT_A_TIME = 64  # fewer pay the share of Python in a call too often, more gain nothing (benchmarks/README.md)
MEMORY = 512 * 2**20


@dataclass(frozen=True)
class Contribution:
    """Signed scores of some samples on some targets: ``scores[name]`` is ``(samples, targets, *parameter shape)``."""

    samples: slice
    targets: slice
    scores: dict[str, Tensor]


def attribute(
    function: ModelFunction,
    segments: Callable[[], Iterable[Segment]],
    x: Inputs,
    y: Labels,
    *,
    nodes: int = 1,
    rule: str = "midpoint",
    tolerance: float | None = None,
    early: tuple[int, int] | None = None,
    share: str = "kernel",
    memory: int = MEMORY,
    skip: int = 0,
    tick: Callable[[int], None] = lambda amount: None,
    evaluated: Callable[[int], None] = lambda gradients: None,
) -> Iterator[Contribution]:
    """Parameter-wise scores of the samples, in chunks that fit ``memory`` bytes.

    Args:
        function: the model and its target.
        segments: called once per chunk, gives the path's pieces in order.
        x, y: scoring samples and labels.
        nodes, rule: quadrature within each piece; for what one midpoint is good for see docs/kernel.md.
        tolerance: instead of a fixed rule, halve a piece until every interval's sum of scores is off by less, per sample.
        early: ``(steps, nodes)``: the first steps of training, where Adam moves furthest, and how many nodes they get.
        share: ``"kernel"`` (U), ``"regularisation"`` (R), ``"whole"`` (D) or ``"survival"`` (what decay left of U).
        skip: chunks that are done already.
        tick: called with the number of samples done, once per piece and chunk.
        evaluated: called with the number of gradients taken, each of one target of one sample at one point of the path.

    Raises:
        PrunekitError: ``memory`` does not hold one sample's scores for one target.
    """
    later, first_steps = get_rule(rule, nodes), 0 if early is None else early[0]
    earlier = later if early is None else get_rule(rule, early[1])
    x, y = to(x, function.device), to(y, function.device)
    count = size(x)
    first = next(iter(segments()), None)
    if first is None or not count:
        return
    # Engines are compared where the piece ends; at 0 all gradients are 0 or, of normalised weights, NaN: that tells nothing.
    state = (first.end if bool(first.end.any()) else first.start).to(function.device)
    targets = targets_of(function, state, x, y)
    engine = choose_engine(function, state, x, y)
    entries = function.layout.parameters
    for samples, columns in chunks(count, targets, function.layout.total * state.element_size(), memory)[skip:]:
        narrow = function if columns == slice(0, targets) else function.narrowed(columns)
        one = engine if narrow is function else choose_engine(narrow, state, x, y)
        rows = samples.stop - samples.start
        total = {e.name: state.new_zeros(rows, columns.stop - columns.start, *e.shape) for e in entries}
        part = take(x, samples, count), take(y, samples, count)
        for segment in segments():
            quadrature = earlier if segment.index < first_steps else later
            _add(narrow, one, segment, SHARES[share](segment), *part, quadrature, tolerance, total, evaluated)
            tick(rows)
        yield Contribution(samples, columns, total)


@torch.no_grad()
def targets_of(function: ModelFunction, state: Tensor, x: Inputs, y: Labels) -> int:
    """How many targets a sample has."""
    one = slice(0, 1)
    part = to(take(x, one), function.device), to(take(y, one, size(x)), function.device)
    return function(state.to(function.device), *part).shape[1]


def chunks(samples: int, targets: int, bytes_each: int, memory: int) -> list[tuple[slice, slice]]:
    """Which samples and targets are scored together; targets are split only when one sample's do not fit.

    Args:
        bytes_each: of one sample's scores for one target.
        memory: bytes; scores, a gradient of the same size and a product of both are held at a time.

    Raises:
        PrunekitError: not even one sample and target fits.
    """
    fit = memory // (3 * bytes_each)
    if fit < 1:
        raise PrunekitError(
            f"memory of {memory / 2**20:.0f} MiB does not hold one sample's scores for one target, which take "
            f"{3 * bytes_each / 2**20:.0f} MiB; raise --memory"
        )
    columns = min(targets, fit)
    rows = min(SAMPLES_AT_A_TIME, fit // columns)
    return [
        (slice(a, min(a + rows, samples)), slice(b, min(b + columns, targets)))
        for a in range(0, samples, rows)
        for b in range(0, targets, columns)
    ]


def _add(
    function: ModelFunction,
    engine: GradientEngine,
    segment: Segment,
    moved: Tensor,
    x: Inputs,
    y: Labels,
    quadrature: list[tuple[float, float]],
    tolerance: float | None,
    total: dict[str, Tensor],
    evaluated: Callable[[int], None],
) -> None:
    """One piece's scores, added to ``total``."""
    samples, targets = next(iter(total.values())).shape[:2]
    start, end, moved = (v.to(function.device) for v in (segment.start, segment.end, moved))
    views = function.layout.views
    if tolerance is None:
        for node, weight in quadrature:
            scale = views(moved * weight if weight != 1 else moved)
            engine.accumulate(torch.lerp(start, end, node), x, y, scale, total)
            evaluated(samples * targets)
        return
    with torch.no_grad():
        f_begin, f_end = function(start, x, y), function(end, x, y)
    for piece in bisect(function, start, end, x, y, f_begin, f_end, tolerance):
        theta, scale = torch.lerp(start, end, piece.node), views(moved * piece.weight)
        evaluated(len(piece.who) * targets)
        if len(piece.who) == samples:
            engine.accumulate(theta, x, y, scale, total)
            continue
        part = {name: t.new_zeros(len(piece.who), *t.shape[1:]) for name, t in total.items()}
        engine.accumulate(theta, take(x, piece.who, samples), take(y, piece.who, samples), scale, part)
        for name, t in total.items():
            t.index_add_(0, piece.who, part[name])


def looked_at(count: int, samples: int = 8) -> list[int]:
    """Which of ``count`` samples stand for all where errors are estimated: spread evenly."""
    return list(range(count))[:: max(1, count // samples)][:samples]


def score_error(
    function: ModelFunction,
    segments: Callable[[], Iterable[Segment]],
    x: Inputs,
    y: Labels,
    *,
    nodes: int,
    rule: str,
    early: tuple[int, int] | None = None,
    share: str = "kernel",
    samples: int = 8,
    pieces: int = 8,
    count: int | None = None,
) -> dict[str, float]:
    """How far single scores are off, by doubling the nodes on some pieces and samples.

    A certificate speaks of sums over weights; this speaks of the weights.

    Args:
        samples, pieces: how many are looked at, at most.
        count: how many pieces there are, where that is known; else the path is walked once more to see.

    Returns:
        ``relative``: ``Σ_i |I'_i - I_i| / Σ_i I'_i`` of the importances (absolute value per sample and target, summed)
        with twice the nodes, I', and with the asked ones, I; ``weight_p95``: the 95th percentile of
        ``|I'_i - I_i| / I'_i`` over weights that matter (above the mean); ``samples``, ``pieces``: how many were looked at.
    """
    given = size(x)
    every = looked_at(given, samples)
    own = [every[place] for place in ranks.stretch(len(every))]
    all_pieces = sum(1 for _ in segments()) if count is None else count
    chosen = set(list(range(all_pieces))[:: max(1, all_pieces // pieces)][:pieces])

    def some() -> Iterator[Segment]:
        return (s for number, s in enumerate(segments()) if number in chosen)

    found = []
    for factor in (1, 2):
        sooner = None if early is None else (early[0], factor * early[1])
        total = torch.zeros(sum(entry.size for entry in function.layout.parameters), dtype=torch.float64)
        if own:  # a rank may have none
            mine = take(x, own, given), take(y, own, given)
            for part in attribute(function, some, *mine, nodes=factor * nodes, rule=rule, early=sooner, share=share):
                total += torch.cat([t.abs().sum((0, 1)).flatten() for t in part.scores.values()]).double().cpu()
        ranks.add_up([total])
        found.append(total)
    coarse, fine = found
    difference = (fine - coarse).abs()
    matter = fine > fine.mean()
    return {
        "relative": float(difference.sum() / fine.sum().clamp_min(1e-300)),
        "weight_p95": float((difference[matter] / fine[matter]).quantile(0.95)) if bool(matter.any()) else 0.0,
        "samples": len(every),
        "pieces": len(chosen),
    }
