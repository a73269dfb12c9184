"""Which training samples a prediction comes from: the backward recursion through the optimizer (docs/kernel.md).

A sample's gradient enters a step directly and through the optimizer's buffer, so its effect on ``f(x; θ_N)`` is its
product with an accumulator that runs backwards over the steps, one per target:

    V_s   = rate_s through_s φ_s + carry_{s+1} V_{s+1}               what a unit in the buffer will do
    score = -c ∇l_k · (rate_s direct_s φ_s + gain_s V_s) / |B_s|     c: clipping and micro-batch weights

ExPLAIND's data-wise kernel (arXiv 2505.20076) for any optimizer that has a rule. No buffer grows with the training set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Batch, Inputs, Labels, size, take, to
from prunekit.errors import PrunekitError, UsageError
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.gradients import GradientEngine, choose_engine
from prunekit.kernel.quadrature import get_rule
from prunekit.task.losses import Loss, as_loss
from prunekit.trajectory.rules import StepLog
from prunekit.trajectory.trajectory import Trajectory

GRADIENT_BYTES = 64 * 2**20  # training gradients held at a time


@dataclass(frozen=True)
class DataScores:
    """What the outputs are made of.

    Attributes:
        scores: of every training sample on every target, summed over the steps that saw it,
            ``(training samples, samples, targets)``.
        regularisation: of weight decay and whatever else moved the weights without data, ``(samples, targets)``.
        momentum: of what was in the optimizer's buffers before the first step, ``(samples, targets)``.
        start: ``f`` at the first state, ``(samples, targets)``.
        by_step: of the watched training samples, in each step, ``(steps, watched, samples, targets)``.
    """

    scores: Tensor
    regularisation: Tensor
    momentum: Tensor
    start: Tensor
    by_step: Tensor

    @property
    def rebuilt(self) -> Tensor:
        """``f_0 + Σ_k score_k + regularisation + momentum``: f at the last state, up to quadrature (with ``only``: if no

        other coordinate had moved)."""
        return self.start + self.scores.sum(0) + self.regularisation + self.momentum


def data_scores(
    function: ModelFunction,
    trajectory: Trajectory,
    x: Inputs,
    y: Labels,
    batch: Callable[..., Batch],
    loss: Any = None,
    *,
    aggregate: bool | Tensor = False,
    only: Tensor | None = None,
    watch: Sequence[int] = (),
    count: int | None = None,
    nodes: int = 1,
    rule: str = "midpoint",
    each: Callable[[int, Tensor, Tensor], None] | None = None,
    tick: Callable[[int], None] = lambda amount: None,
) -> DataScores:
    """Data-wise scores of every training sample.

    Memory: ``samples × targets × P`` numbers for the accumulators, twice with Nesterov; give few samples at a time, or
    ask for the sum over all samples and targets (``aggregate``), which needs P and one backward pass a step.

    Args:
        batch: ``batch(indices)`` -> training inputs and labels as the step saw them; called as
            ``batch(indices, seed)`` where the recorder noted an augmentation seed.
        loss: what was trained on, ``(outputs, labels) -> scalar``; the function's task's own when None.
        aggregate: explain ``Σ_x Σ_c f_c(x)`` alone; samples and targets are then 1. Weights ``(queries, samples, targets)``
            explain that many weighted sums, in the place of targets; a sample without weight in one costs nothing there.
        only: flat mask ``(P,)``: what training samples did through these coordinates; None for all.
        watch: training samples whose scores are wanted by step too.
        count: how many training samples there are; by default up to the last one that any step saw.
        nodes, rule: quadrature within each step.
        each: called with a step, the training samples of a batch in it, and their scores ``(indices, samples, targets)``.
        tick: called once per step.

    Raises:
        PrunekitError: batches were not recorded, the path skips states, or the optimizer has no rule (or lacks second
            moments); the message says what to do.
        UsageError: ``count`` is too small, or the loss mixes the samples of a batch.
    """
    check_data_scores(trajectory)
    x, y = to(x, function.device), to(y, function.device)
    quadrature = get_rule(rule, nodes)
    layout = function.layout
    start, end = trajectory.state(0).to(function.device), trajectory.state(-1).to(function.device)
    with torch.no_grad():
        first = function(start, x, y)
    weights = None if aggregate is False else torch.ones_like(first)[None] if aggregate is True else aggregate.to(first)
    engine: GradientEngine = choose_engine(function, end, x, y) if weights is None else _Summed(function, weights)
    first = _summed(first, weights)
    samples, targets = first.shape
    moving = torch.ones_like(start) if only is None else only.to(start)
    products = _Products(function, function.task.loss if loss is None else as_loss(loss), batch, moving)
    value = start.new_zeros(samples, targets, layout.total)  # V
    last_seen = max((k for s in range(len(trajectory)) for b in trajectory.step(s).batches or () for k in b), default=-1)
    if count is not None and count <= last_seen:
        raise UsageError(f"count is {count}, but training saw sample {last_seen}")
    scores = start.new_zeros(last_seen + 1 if count is None else count, samples, targets)
    by_step = start.new_zeros(len(trajectory), len(watch), samples, targets)
    regularisation = torch.zeros_like(first)
    for segment in trajectory.segments():
        theta, after, share = (v.to(function.device) for v in (segment.start, segment.end, segment.regularisation))
        share = share * moving
        if share.any():
            for node, weight in quadrature:
                slope = function.directional(torch.lerp(theta, after, node), share, x, y)[1]
                regularisation += weight * _summed(slope, weights)
    for s in reversed(range(len(trajectory))):
        theta, after = trajectory.state(s).to(function.device), trajectory.state(s + 1).to(function.device)
        part = _advance(s, trajectory, engine, value, theta, after, x, y, quadrature, moving)
        step = trajectory.step(s)
        if step.moved:
            seen = trajectory.state(s - step.behind).to(theta.device) if step.behind else theta
            for where, found in products.of(seen, step, trajectory.random_states(s), part):
                scores.index_add_(0, where.to(scores.device), found.to(scores.dtype))
                if each is not None:
                    each(s, where, found)
                for number, k in enumerate(watch):
                    by_step[s, number] += found[(where == k).to(found.device)].sum(0)
        tick(1)
    return DataScores(scores, regularisation, _momentum(trajectory, value), first, by_step)


def _summed(values: Tensor, weights: Tensor | None) -> Tensor:
    """``(samples, targets)`` as it is, or its weighted sums ``(1, queries)``."""
    return values if weights is None else (weights * values).sum((1, 2))[None]


def _advance(
    s: int,
    trajectory: Trajectory,
    engine: GradientEngine,
    value: Tensor,
    theta: Tensor,
    after: Tensor,
    x: Inputs,
    y: Labels,
    quadrature: list[tuple[float, float]],
    moving: Tensor,
) -> Tensor:
    """One step back: moves ``value`` in place from ``carry_{s+1} V_{s+1}`` to ``carry_s V_s``.

    Returns:
        ``rate direct φ + gain V_s``, what a unit of gradient does, ``(samples, targets, P)``. Parameters that the step
        left alone keep their value and give 0. Coordinates outside ``moving`` stay 0 throughout.
    """
    layout, spans = trajectory.layout, trajectory.recursion.spans
    moments = trajectory.second_moments(s)
    linear = dict(trajectory.recursion.step(s, None if moments is None else moments.to(theta.device)))
    scale = torch.zeros_like(theta)
    for name, one in linear.items():
        scale[spans[name]] = one.rate * (one.through or one.direct)
        if not one.through:
            value[..., spans[name]].zero_()  # no buffer: nothing is carried
    scale *= moving
    before = value.clone() if any(one.through and one.direct for one in linear.values()) else value
    into = {e.name: value[..., e.span].view(*value.shape[:2], *e.shape) for e in layout.parameters if bool(moving[e.span].any())}
    for node, weight in quadrature:
        engine.accumulate(torch.lerp(theta, after, node), x, y, layout.views(scale * weight), into)
    part = torch.zeros_like(value)
    for name, one in linear.items():
        span = spans[name]
        part[..., span] = value[..., span] * (one.gain if one.through else 1.0)
        if one.through and one.direct:
            part[..., span] += (value[..., span] - before[..., span]) * (one.direct / one.through)
        value[..., span] *= one.carry
    return part


class _Summed:
    """Gradients of weighted sums over samples and targets, by one plain backward pass each."""

    def __init__(self, function: ModelFunction, weights: Tensor) -> None:
        self.function = function
        self.queries = [(who := row.any(1).nonzero()[:, 0], row[who]) for row in weights]

    def accumulate(self, theta: Tensor, x: Inputs, y: Labels, scale: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for number, (who, weight) in enumerate(self.queries):
            if not len(who):
                continue
            samples = size(x)
            found = self.function.gradient(theta, take(x, who, samples), take(y, who, samples), weight)[1]
            gradient = self.function.layout.views(found)
            for name, total in into.items():
                total[:, number].addcmul_(gradient[name], scale[name])


class _Products:
    """``-c ∇l_k · part / |micro-batch|`` for every sample of a step; ``part`` is 0 outside ``moving``.

    ``l_k`` is the sample's single loss times its factor in the batch's (``prunekit.task.losses``).
    """

    def __init__(self, function: ModelFunction, loss: Loss, batch: Callable[..., Batch], moving: Tensor) -> None:
        self.batch, self.loss = batch, loss
        self.entries = [e for e in function.layout.parameters if bool(moving[e.span].any())]
        self.function = ModelFunction(
            function.model,
            function.layout,
            target=lambda out, labels: loss.of_each(out, labels)[:, None],
            device=function.device,
            training=True,
            task=function.task,
        )
        self.whole = copy.copy(self.function)
        self.whole.target = lambda out, labels: out.reshape(len(out), -1)
        self.separable = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in function.model.modules())
        self.replays = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in function.model.modules())
        self._engine: GradientEngine | None = None

    def of(self, theta: Tensor, step: StepLog, random: list[Tensor] | None, part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(indices, scores (indices, samples, targets))`` of each micro-batch."""
        for number, (indices, weight, seed) in enumerate(zip(step.batches or (), step.weights, step.seeds, strict=True)):
            if not weight:
                continue
            where = torch.tensor(indices)
            x, y = self.batch(where) if seed is None else self.batch(where, seed)
            x, y = to(x, theta.device), to(y, theta.device)
            state = random[number] if random else None
            found = self._directional(theta, x, y, part, state) if self._mixes() else self._gradients(theta, x, y, part)
            factor = step.gradient_scale * weight / len(indices)
            found = found * -factor
            factors = self._factors(theta, x, y, state)
            yield where, found if factors is None else found * factors[:, None, None].to(found)

    def _factors(self, theta: Tensor, x: Inputs, y: Labels, random: Tensor | None) -> Tensor | None:
        """What each sample's single loss counts in the batch's mean; None where all count the same."""
        if self.loss.weights is not None:
            known = self.loss.known_factors(y)
            return None if bool((known == 1).all()) else known
        factors: list[Tensor] = []

        def note(out: Tensor, labels: Labels) -> Tensor:
            factors.append(self.loss.factors(out, labels))
            return out.reshape(len(out), -1)

        self.whole.target = note
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if random is not None:
                torch.set_rng_state(random)
            self.whole(theta, x, y)
        return None if bool((factors[0] == 1).all()) else factors[0]

    def _mixes(self) -> bool:
        """Samples of a batch share statistics or one stream of random numbers: the batch must be run as a whole."""
        return not self.separable or self.replays

    def _gradients(self, theta: Tensor, x: Inputs, y: Labels, part: Tensor) -> Tensor:
        """By per-sample gradients and one matrix product: P multiply-adds per pair, fewer than a forward pass."""
        layout = self.function.layout
        if self._engine is None:
            self._engine = choose_engine(self.function, theta, x, y)
        ones = layout.views(torch.ones_like(theta))
        rows = []
        samples = size(x)
        most = max(1, GRADIENT_BYTES // (theta.element_size() * layout.total))
        for begin in range(0, samples, most):
            piece = slice(begin, min(begin + most, samples))
            flat = theta.new_zeros(piece.stop - begin, layout.total)
            into = {e.name: flat[:, e.span].view(len(flat), 1, *e.shape) for e in self.entries}
            self._engine.accumulate(theta, take(x, piece, samples), take(y, piece, samples), ones, into)
            rows.append(flat @ part.flatten(0, 1).T)
        return torch.cat(rows).view(samples, *part.shape[:2])

    def _directional(self, theta: Tensor, x: Inputs, y: Labels, part: Tensor, random: Tensor | None) -> Tensor:
        """By one forward-mode pass per target over the whole batch, in training mode, random numbers replayed."""
        columns = []
        for direction in part.flatten(0, 1):
            with torch.random.fork_rng(devices=[]):
                if random is not None:
                    torch.set_rng_state(random)
                columns.append(self.function.directional(theta, direction, x, y)[1][:, 0])
        return torch.stack(columns, 1).view(size(x), *part.shape[:2])


def check_data_scores(trajectory: Trajectory) -> None:
    """Raises PrunekitError where data-wise scores cannot be had; the message says what to do."""
    parent = trajectory.provenance.get("parent")
    if isinstance(parent, dict) and "trajectory" in parent:
        raise PrunekitError(
            f"{trajectory.folder}: fine-tuning with masks held; data-wise scores are those of training steps without masks"
        )
    if not trajectory.recursion.explains_data:
        why = trajectory.rule_note or "second moments were not recorded"
        if "second" in why:
            why += f"; {trajectory.asked('second_moments', 'True')} keeps them"
        raise PrunekitError(f"{trajectory.folder}: data-wise scores cannot be had: {why}")
    if trajectory.pieces != len(trajectory):
        raise PrunekitError(
            f"{trajectory.folder}: data-wise scores need every state; this path keeps {trajectory.pieces} of "
            f"{len(trajectory)}; {trajectory.asked('every', '1')} keeps all"
        )
    missing = [s for s in range(len(trajectory)) if trajectory.step(s).moved and trajectory.step(s).batches is None]
    if missing:
        raise PrunekitError(
            f"{trajectory.folder}: step {missing[0]} has no sample indices; iterate over recorder.watch(loader), or "
            "call recorder.batch(indices) before each step"
        )


def _momentum(trajectory: Trajectory, value: Tensor) -> Tensor:
    """What the optimizer's buffers held before the first step did; ``value`` is ``carry_0 V_0``."""
    total = value.new_zeros(value.shape[:2])
    for name, buffer in trajectory.recursion.buffers(trajectory.start_states):
        total -= value[..., trajectory.recursion.spans[name]] @ buffer.flatten().to(value)
    return total
