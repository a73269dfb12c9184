"""Mask and weights learnt in the same steps from a stream, by the divergence from the dense model.

Scores of a mask start and move as in ``prunekit.repair.streamed``; the same gradient, of the weights as they are masked, moves
the weights by Adam. In the last fifth of the steps the mask is held and weights alone are moved, since what would change places
then has no time left. So no token is spent for one of the two alone.

Where weights begin with what a layer-wise method has made of them, so does the mask, hard from the first step on, since a soft
one would undo what fits together; and how far a step may move scores is searched for, as it is for weights: the more of a model
is right already, the more harm there is in moving a mask by what is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.apply import check_made_for, masked
from prunekit.batch import Batch, Inputs, Labels
from prunekit.errors import UsageError
from prunekit.plan import Plan
from prunekit.repair.learner import Adam, Learner, summed
from prunekit.repair.live import Live, Use
from prunekit.repair.refine import RefineOptions
from prunekit.repair.streamed import COLD, HOT, RATE, Streaming, StreamLearning, parts_of
from prunekit.repair.swaps import Swaps, get_swaps
from prunekit.repair.track import Recording, Track
from prunekit.repair.weights import Weights
from prunekit.task import Task
from prunekit.task.settle import settle
from prunekit.training.line_search import Direction, best_length
from prunekit.trajectory import Layout
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.copies import copied

HOLD = 0.8
"""The share of the steps after which the mask is held."""
LENGTH, OF_LENGTH = 0.03, 0.7
"""The length along the scores' direction that is tried first; their rate is that share of the best one, and never above the usual
rate: of N:M one long step may help where as long ones in every step undo what ADMM has fitted."""
OF_WEIGHTS = 16.0
"""Bytes of a trained weight in single precision: its value, Adam's moments, and the best value so far."""


class Both(Learner):
    """Scores that a step moves together with the weights that they are of, and with all others of the model.

    Args:
        swaps, live, worth, lean: as of ``Learner``. ``live.scaled`` are all tensors that are trained, and ``live.dense`` has
            their values, which are changed in place.

    Attributes:
        held: the mask ``(U,)`` from when on scores are not moved any more; None until then.
        seen: called in every step but the first, once the model is what the step before has made of it.
    """

    def __init__(self, swaps: Swaps, live: Live, worth: Tensor, lean: bool = False) -> None:
        super().__init__(swaps, live, worth, lean)
        self.held: Tensor | None = None
        self._own = frozenset(swaps.scaled())
        self._whole = {name: live.dense[name].new_ones(()) for name in live.scaled}
        self._moments = {name: Adam(live.dense[name]) for name in live.scaled}
        self.seen: Callable[[], None] = lambda: None

    def hold(self) -> None:
        """The mask by the scores now stays."""
        self.held = self.swaps.select(self.scores)

    def masks(self) -> Tensor:
        return super().masks() if self.held is None else self.held

    def move(self, batches: Sequence[tuple[Inputs, Labels]], samples: int, rate: float, of_weights: float, heat: float) -> float:
        """Moves scores and weights once; arguments and what is returned as of ``step``.

        Args:
            of_weights: the weights' rate.
        """
        self.steps += 1
        factor, slope, total = self.show(heat)
        if self.steps > 1:
            self.seen()

        def use(name: str, gradient: Tensor | None) -> None:
            if gradient is None:
                return
            value = self.live.dense[name]
            gradient = gradient.to(value)
            found = gradient
            if name in self._own:
                mask = factor(name).to(value)
                found = gradient * mask
                if self.held is None:
                    self._of_scores(name, gradient.mul_(value), mask if heat else None, total, rate, heat)
            self._moments[name].move(value, found, of_weights, self.steps)

        with torch.no_grad():
            mean = summed(self.live, batches, samples, use)
            if total is not None:
                total = self.swaps.per_weight(total)
                self._states[""].move(self.scores, total if slope is None else total * slope, rate, self.steps)
        return mean

    def show(self, heat: float) -> tuple[Callable[[str], Tensor], Tensor | None, Tensor | None]:
        """Scales the model as a step of this heat will; returns what ``_factors`` does."""
        found = self._factors(heat)
        self.live.scale(lambda name: found[0](name) if name in self._own else self._whole[name])
        return found

    def _factors(self, heat: float) -> tuple[Callable[[str], Tensor], Tensor | None, Tensor | None]:
        """Every scaled tensor's factors by name; units' derivative by the scores; where units' gradients add up, if they do."""
        swaps = self.swaps
        if self.held is not None:
            held = self.held
            return lambda name: swaps.factor(name, held), None, None
        if heat and isinstance(swaps, Weights):
            levels = swaps.levels(self.scores)

            def soft(name: str) -> Tensor:
                return torch.sub(swaps.factor(name, self.scores), levels(name)).div_(heat).sigmoid_()

            return soft, None, None
        units, slope = self._units(1.0, heat)
        return lambda name: swaps.factor(name, units), slope, torch.zeros_like(self.scores) if swaps.spans is None else None

    def _of_scores(self, name: str, signed: Tensor, mask: Tensor | None, total: Tensor | None, rate: float, heat: float) -> None:
        """Takes the gradient with respect to a tensor's factors, times nothing more: moves its scores, or adds it up by units."""
        if total is not None:
            self.swaps.add(name, signed, self.scores, total)
            return
        if mask is not None:
            signed.mul_(mask * (1 - mask)).div_(heat)
        self._states[name].move(self.swaps.factor(name, self.scores), signed, rate, self.steps)


class TogetherLearning(StreamLearning):
    """``StreamLearning`` of mask and weights; weights are those of a copy of the model, which stays as it is.

    Args:
        swaps, model, given, options: as of ``StreamLearning``.
        of_weights: the weights' rate at first, for Adam; None: the best step along its direction (``training.line_search``).
        start: a pruned model whose weights those that the given mask keeps begin with, and all that are not prunable; the rate of
            single weights' scores is then searched for, where ``options`` say none.
        record: where its states go; None to record nothing.
    """

    of_runs = RATE  # the larger one gains nothing where weights move too

    def __init__(
        self,
        swaps: Swaps,
        model: nn.Module,
        *given: Any,
        of_weights: float | None = None,
        start: nn.Module | None = None,
        record: Recording | None = None,
        **options: Any,
    ) -> None:
        self._own = copied(model)
        self._record, self._layout, self._taken_at = record, Layout.of(model), 0
        self._track: Track | None = None
        super().__init__(swaps, self._own, *given, reference=model, **options)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._live.scaled = [name for name in self._live.dense if name in trained]
        self.of_weights = of_weights
        self._best: dict[str, Tensor] = {}
        self._begun = start is not None
        if start is not None:
            self._begin_with(start)

    @torch.no_grad()
    def _begin_with(self, start: nn.Module) -> None:
        given, own = named_tensors(start), set(self._swaps.scaled())
        for name in self._live.scaled:
            value, first = self._live.dense[name], given[name].to(self._live.dense[name])
            keep = self._swaps.factor(name, self._swaps.keep).bool() if name in own else first.new_ones((), dtype=torch.bool)
            value.copy_(torch.where(keep, first, value))
        self.taken()
        if self._how.soft is None:
            self._soft = False

    def begin(self, batches: Iterator[Sequence[Batch]]) -> Both:
        looked = list(islice(batches, self.looked))
        scores = self._start(iter(looked))
        if self._begun:
            scores = seated(scores, self._swaps.keep)
        if self.of_weights is None:
            self.of_weights = self._best_step(looked, self._swaps.select(scores))
        self.learner = both = Both(self._swaps, self._live, scores, self._how.lean)
        if self._begun and self._how.rate is None and self._swaps.spans is not None:
            self.rate = min(self.rate, OF_LENGTH * self._best_move(looked, both.scores))
        if (track := self._begun_track()) is not None:
            with track.set():
                both.show(HOT if self._soft else 0.0)
            both.seen = track.step
        return both

    def _begun_track(self) -> Track | None:
        """The path, from the given mask on."""
        if self._record is not None and self._track is None:
            self._track = Track(self._record, self._live, self._layout, self.steps)
            self._show(self._swaps.keep)
            self._track.begin()
        return self._track

    def ended(self, model: nn.Module) -> None:
        """The path ends at the model that was taken."""
        if (track := self._begun_track()) is not None:
            track.end(model, moved=0 < self._taken_at == self.done)

    def abandoned(self, error: BaseException) -> None:
        """Learning failed, and so the path ends."""
        if self._track is not None:
            self._track.abandon(error)

    def _best_move(self, batches: Sequence[Sequence[Batch]], scores: Tensor) -> float:
        """Of the scores, as ``_best_step`` of the weights."""
        swaps, own, direction = self._swaps, set(self._swaps.scaled()), Direction[str]()

        def use(name: str, gradient: Tensor | None) -> None:
            if gradient is not None and name in own:
                direction.add(name, gradient.mul_(self._live.dense[name]))

        self._look(batches, swaps.select(scores), use, direction)
        steps, moved = direction.finish(), torch.empty_like(scores)

        @torch.no_grad()
        def at(length: float) -> float:
            moved.copy_(scores)
            for name, step in steps.items():
                swaps.factor(name, moved).sub_(step, alpha=length)
            return self._judged(swaps.select(moved))

        return best_length(at, LENGTH)

    def _look(self, batches: Sequence[Sequence[Batch]], keep: Tensor, use: Use, direction: Direction[str]) -> None:
        """Gives ``use`` every tensor's gradient under a mask, batch by batch."""
        for batch in batches:
            self._show(keep)
            summed(self._live, [self._referred(part) for part in batch], self._stream.batch_size, use)
            direction.next()

    def _best_step(self, batches: Sequence[Sequence[Batch]], keep: Tensor) -> float:
        """Of the weights under a mask, whose direction ``batches`` say and whose length those samples that judge."""
        live, own, direction = self._live, set(self._swaps.scaled()), Direction[str]()

        def use(name: str, gradient: Tensor | None) -> None:
            if gradient is not None:
                direction.add(name, gradient.mul_(self._swaps.factor(name, keep)) if name in own else gradient)

        self._look(batches, keep, use, direction)
        steps = direction.finish()
        before = {name: live.dense[name].clone() for name in steps}

        @torch.no_grad()
        def at(length: float) -> float:
            for name, step in steps.items():
                live.dense[name].copy_(before[name]).sub_(step, alpha=length)
            return self._judged(keep)

        length = best_length(at)
        for name, value in before.items():
            live.dense[name].copy_(value)
        return length

    def step(self, batch: Sequence[Batch], gone: float) -> float:
        learner = self.learner
        assert isinstance(learner, Both)
        assert self.of_weights is not None
        if gone >= HOLD and learner.held is None:
            learner.hold()
        left = max(0.0, 1 - gone / HOLD)
        heat = HOT * (COLD / HOT) ** (1 - left) if self._soft and left else 0.0
        referred = [self._referred(part) for part in batch]
        return learner.move(referred, self._stream.batch_size, self.rate * left, self.of_weights * (1 - gone), heat)

    def taken(self) -> None:
        self._taken_at = self.done
        self._best = {name: self._live.dense[name].clone() for name in self._live.scaled}

    @torch.no_grad()
    def pruned(self, plan: Plan) -> nn.Module:
        """The model with the best weights and the plan's mask; those it began with where nothing was better than the given."""
        made = copied(self._dense)
        named = named_tensors(made)
        for name, value in self._best.items():
            named[name].copy_(value)
        return masked(made, plan)

    def facts(self) -> dict[str, Any]:
        """As of ``StreamLearning``, and ``weights``: their ``rate``, ``hold`` and ``start``; in ``bytes`` what they take."""
        found = super().facts()
        if "bytes" in found:
            prunable, trained = (
                sum(self._live.dense[name].numel() for name in names) for names in (self._swaps.scaled(), self._live.scaled)
            )
            found["bytes"] = {**found["bytes"], "weights": round(OF_WEIGHTS * trained / prunable, 3)}
        weights = {"rate": self.of_weights, "hold": HOLD, "start": "given" if self._begun else "dense"}
        return {**found, "weights": weights}

    def _show(self, keep: Tensor) -> None:
        own = set(self._swaps.scaled())
        whole = keep.new_ones((), dtype=torch.bool)
        self._live.scale(lambda name: self._swaps.factor(name, keep) if name in own else whole)


def seated(scores: Tensor, keep: Tensor) -> Tensor:
    """The same scores dealt out anew so that the best are those of ``keep``, and the order among these, and the others, stays."""
    found, values = torch.empty_like(scores), scores.sort().values
    kept = int(keep.sum())
    for which, own in ((~keep, values[: len(values) - kept]), (keep, values[len(values) - kept :])):
        where = which.nonzero().flatten()
        found[where[scores[where].argsort()]] = own
    return found


def _check_start(start: nn.Module, model: nn.Module) -> None:
    shapes, wanted = ({name: tuple(p.shape) for name, p in one.named_parameters()} for one in (start, model))
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            has = f"has {name} of shape {shapes[name]}" if name in shapes else f"has no {name}"
            raise UsageError(f"learn_together: start {has}, the model one of {shape}; give the plan's model, masked and not cut")


def learn_together(
    plan: Plan,
    model: nn.Module,
    batches: Any,
    stream: Streaming,
    *,
    task: str | Task | None = None,
    accept: Any = None,
    rate: float | None = None,
    start: nn.Module | None = None,
    seed: int = 0,
    record: Recording | None = None,
) -> tuple[Plan, nn.Module]:
    """A better mask of the same size and weights that go with it, learnt together by the divergence from ``model``.

    Never worse than what it begins with on the samples that it is accepted on: the best that was judged is taken.

    Args:
        plan: how many weights or units stay; made for ``model``.
        model: the trained dense model; left as it is. It is computed with on its own device.
        batches: samples to learn from, as for ``refine``.
        stream: how long, and in which precision.
        task: what the model is for; None where samples leave no doubt.
        accept: samples of their own to judge on; without them a quarter of ``batches`` is set apart for that.
        rate: of the weights at first, for Adam; None: the best step along its direction (``training.line_search``).
        start: the plan's pruned model with other weights, such as a layer-wise method's, to begin with in place of the dense
            ones; what the plan removes has the dense weight, should it come back.
        seed: of the split of the samples, and of the batches.
        record: where the states go that the masked model goes through; the path leads from the dense model to the given mask (and
            ``start``), on to how learning begins, step by step along, and to the model that is taken. None to record nothing.

    Returns:
        the plan, which tells of it as a refined one does, and the pruned model, masked: everything removed is 0.

    Raises:
        ArtifactError: the plan was made for other weights.
        UsageError: an option is out of range, there are too few samples, the structure cannot be refined, or ``start`` has other
            parameters than the model.
        NonFiniteError: the divergence is NaN or Inf.
        ArtifactError: ``record.folder`` holds a trajectory already, or the disk is full.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, make_plan, score
        >>> from prunekit.repair import learn_together
        >>> from prunekit.repair.streamed import Streaming
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> x = torch.randn(64, 4)
        >>> found, pruned = learn_together(plan, model, [(x, model(x).argmax(1))], Streaming(tokens=640, batch=8))
        >>> int((pruned[0].weight == 0).sum() + (pruned[2].weight == 0).sum())
        24
    """
    check_made_for(plan, model)
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"learn_together: rate is {rate!r}; it must be above 0")
    plan.only_zeros("refine")
    if start is not None:
        _check_start(start, model)
    swaps = get_swaps(plan, Layout.of(model), next(model.parameters()).device)
    kind, samples = settle(model, batches, task)
    parts = parts_of(samples, accept, kind, RefineOptions.accept_share, seed)
    learning = TogetherLearning(swaps, model, *parts, stream, of_weights=rate, start=start, record=record, task=kind, seed=seed)
    try:
        found = learning.learnt(plan)
        made = learning.pruned(found)
        learning.ended(made)
    except BaseException as error:
        learning.abandoned(error)
        raise
    return found, made
