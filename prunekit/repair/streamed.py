"""Masks learnt from a stream of fresh samples, at the size of language models: nothing is kept of a sample, nor sorted.

Scores start at ``|θ|^(1-p) (θ² Σ_b ḡ_b²)^(p/2)``, ``ḡ_b`` the loss's mean gradient over a batch; every step takes one batch that
no step before has seen, at a rate that falls to 0; now and then the mask is judged on samples of its own, and the best is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial, reduce
from itertools import islice
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Batch, to
from prunekit.data import Samples, drawn, learn_and_accept
from prunekit.errors import NonFiniteError, UsageError
from prunekit.kernel import ModelFunction
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.repair.deadline import Deadline
from prunekit.repair.fused_kl import fused_kl
from prunekit.repair.hidden import HiddenStates
from prunekit.repair.learner import FisherSum, Learner
from prunekit.repair.live import Live
from prunekit.repair.record import Record
from prunekit.repair.stream import Stream
from prunekit.repair.swaps import Swaps
from prunekit.repair.weights import Runs, Weights
from prunekit.structure.roles import weight_roles
from prunekit.structure.stand_ins import stand_in
from prunekit.task import Classification, Target, Task
from prunekit.task.evaluation import run
from prunekit.trajectory import Layout
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.layout import fixed_state

HOT, COLD = 1.0, 0.05
"""Standard deviations of the scores over which a soft mask goes from 0 to 1, at the first step and at the last."""
DENSE = 0.25
"""The share kept from which masks are soft: with little kept they did worse, since only weights near the level move."""
LEAST = 2
"""Batches, at least: one that scores start from, one to learn from."""
FIRST_LOOK = 16
"""Batches that scores start from, at most; of a short stream a tenth."""
RATE, RATE_OF_RUNS, WIDTH = 0.06, 0.12, 96
"""Adam's rate at the first step, in standard deviations of the scores, where a layer has ``WIDTH`` inputs: the more inputs, the
more a step that moves all of their weights does to an output, so that single weights' rate is divided by their number (as in µP,
Yang et al., arXiv 2203.03466, for Adam). The second one is inside runs of M weights (N:M), where a weight has to pass by its few
neighbours, whose scores lie further apart than those near one threshold for all."""


def usual_rates() -> list[float]:
    """What a rate that nobody says follows from, for reuse."""
    return [RATE, RATE_OF_RUNS, WIDTH]


@dataclass(frozen=True)
class Streaming:
    """How long to learn from a stream, and in which precision.

    Attributes:
        tokens: that are learnt from in all, those of the first look included: of text its tokens, else samples.
        batch: samples a step.
        rate: of Adam at the first step, in standard deviations of the scores; it falls to 0 in a straight line. None: ``RATE``
            (``RATE_OF_RUNS``) by the layers' width, or what is found where weights move too and begin with others than the
            dense ones (``prunekit.repair.together``).
        looks: how often the mask is judged on the way.
        soft: masks are soft at first and hard at the end, ``σ((score - level) / heat)`` with the heat falling
            from ``HOT`` to ``COLD`` standard deviations of the scores; else hard in every step. None: soft where at least
            ``DENSE`` of the units stay.
        lean: factored second moments and first ones in bfloat16: 10 bytes a weight beside the model, for 16.
        autocast: compute in bfloat16 where torch's autocast does; ``reference``: only what the steps compare with, the dense
            model's outputs or hidden states. Divergences and losses themselves are computed in full.
        checkpointing: run the blocks of the model again instead of keeping their activations.

    Raises:
        UsageError: one is out of range.
    """

    tokens: int
    batch: int = 16
    rate: float | None = None
    looks: int = 10
    soft: bool | None = None
    lean: bool = True
    autocast: bool | Literal["reference"] = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "looks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"refine: {name} is {value!r}; it must be a whole number from 1 upwards")
        if self.autocast not in (False, True, "reference"):
            raise UsageError(f"refine: autocast is {self.autocast!r}; it must be true, false or reference")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"refine: rate is {self.rate!r}; it must be above 0")


@dataclass(frozen=True)
class Look:
    """A mask that was judged.

    Attributes:
        step: after which.
        keep: ``(U,)``.
        learn: mean of the target over the batches since the last look, each where its step took the gradient.
        accept: its mean over the samples that judge.
    """

    step: int
    keep: Tensor
    learn: float
    accept: float


def parts_of(samples: Samples | None, accept: Any, task: Task, share: float, seed: int) -> tuple[Samples, Samples]:
    """Samples to learn from, and others that judge: ``accept``, or where None a share of the same."""
    given = Samples.of(samples or (), task.batch)
    judged = None if accept is None else Samples.of(accept, task.batch)
    return learn_and_accept(given, judged, drawn(given, share, seed), "refine")


class StreamLearning:
    """Learning in progress: ``looks()`` gives masks as they are judged, the given one first.

    Args:
        model: whose weights stay or go; it is left as it is, and computed with on its own device.
        samples: to learn from; fetched as they are needed.
        accept: to judge on, as often as there are looks.
        target: ``kl``, ``hidden``, ``loss``, or a function ``(outputs, labels) -> (samples, targets)``.
        temper: p of the scores' start.
        reference: the model whose outputs or hidden states are stayed close to; ``model`` itself where None.

    Attributes:
        of_runs: the rate at first inside runs.
    """

    of_runs = RATE_OF_RUNS

    def __init__(
        self,
        swaps: Swaps,
        model: nn.Module,
        samples: Samples,
        accept: Samples,
        how: Streaming,
        *,
        task: Task,
        target: str | Target = "kl",
        temper: float = 0.5,
        seed: int = 0,
        deadline: Deadline | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._dense = model if reference is None else reference
        self._model, self._task, self._swaps, self._how, self._temper = model, task, swaps, how, temper
        self._accept, self._deadline = accept.bounded(how.batch).shared(), deadline or Deadline(None)
        self._judging, self._samples, self._target, self._seed = len(accept), len(samples), target, seed
        self._stream = Stream(samples, how.batch, device, seed)
        layout = Layout.of(model)
        made = partial(ModelFunction, model, layout, fixed_state(model, layout), device=device, task=task)
        function = made("loss")  # its private copy of the model is the only one
        held = named_tensors(model)
        live = partial(
            Live,
            dense={entry.name: held[entry.name].detach() for entry in layout},
            scaled=swaps.scaled(),
            autocast=how.autocast is True,
            checkpointing=how.checkpointing,
        )
        self._hidden = HiddenStates(self._dense, function.model) if target == "hidden" else None
        aim = _divergence(task) if target == "kl" else self._hidden or target
        self._first, self._live = live(function), live(function.aimed(aim))
        self._refers = target in ("kl", "hidden")
        self._soft = how.soft if how.soft is not None else swaps.count >= DENSE * len(swaps.keep)
        per_batch = self._stream.tokens()
        total = self._stream.steps(how.tokens, "refine", LEAST)
        self.looked = min(FIRST_LOOK, max(1, total // 10))
        self.steps, self.tokens_a_step = total - self.looked, per_batch
        self.learner: Learner | None = None
        self.rate = self._usual_rate() if how.rate is None else how.rate
        self.done, self.seconds = 0, 0.0

    def learnt(self, plan: Plan) -> Plan:
        """The plan with the best of the masks that are judged; of one process Ctrl-C ends the search, not the call.

        Raises:
            NonFiniteError: the target is NaN or Inf.
        """
        looks, ended = self.looks(), "done"
        try:
            first = next(looks)
            record = Record(self._swaps.keep, first.learn, first.accept)
            try:
                for look in looks:
                    facts = {"stage": "learn", "round": look.step, "ranked": "scores"}
                    if record.judge(look.keep, look.learn, look.accept, facts):
                        self.taken()
                ended = "done" if self.done == self.steps else "budget"
            except KeyboardInterrupt:
                if ranks.size() > 1:
                    raise
                ended = "interrupted"
        finally:
            self.close()
        return record.plan(
            plan,
            self._swaps,
            target=self._target,
            samples=(self._samples, self._judging),
            ended=ended,
            options={**asdict(self._how), "temper": self._temper, "seed": self._seed},
            stream=self.facts(),
        )

    def taken(self) -> None:
        """The mask that was judged last is the best so far."""

    def looks(self) -> Iterator[Look]:
        """Judged masks; ends when all steps are done or time is over.

        Raises:
            NonFiniteError: the target is NaN or Inf.
        """
        how, swaps = self._how, self._swaps
        batches = self._stream.shared()
        yield Look(0, swaps.keep, *self._given(batches))
        if bool(swaps.keep.all()) or not bool(swaps.keep.any()):
            self.steps = 0  # there is nothing to choose
            return
        learner = self.begin(batches)
        every, since = max(1, self.steps // how.looks), list[float]()
        with Bar("learn", self.steps) as bar:
            for step in range(1, self.steps + 1):
                begun = time.perf_counter()
                gone = max((step - 1) / self.steps, self._deadline.share)
                since.append(self.step(next(batches), gone))
                self.seconds += time.perf_counter() - begun
                self.done = step
                bar.advance()
                if not math.isfinite(since[-1]):
                    raise NonFiniteError(f"refine: the target is {since[-1]} in step {step}; lower rate, or leave out autocast")
                if step % every == 0 or step == self.steps or self._deadline.passed:
                    keep = learner.masks()
                    ranks.alike(f"refine: the mask after step {step}", keep)
                    look = Look(step, keep, ranks.total(sum(since)) / len(since), self._judged(keep))
                    since.clear()
                    bar.describe(f"learn, step {step}: divergence {look.accept:.4g}")
                    yield look
                if self._deadline.passed:
                    return

    def begin(self, batches: Iterator[Sequence[Batch]]) -> Learner:
        """Scores from a first look at some batches, of each this rank's part."""
        self.learner = Learner(self._swaps, self._live, self._start(batches), self._how.lean)
        return self.learner

    def step(self, batch: Sequence[Batch], gone: float) -> float:
        """Learns from one batch; returns the mean of the target there, of several ranks this one's part of it.

        Args:
            batch: this rank's part of it, none or one.
            gone: the share of the steps that is over, in [0, 1).
        """
        assert self.learner is not None
        heat = HOT * (COLD / HOT) ** gone if self._soft else 0.0
        referred = [self._referred(part) for part in batch]
        return self.learner.step(referred, self._stream.batch_size, self.rate * (1 - gone), heat=heat)

    def _usual_rate(self) -> float:
        if not isinstance(self._swaps, Weights):
            return RATE
        return (self.of_runs if isinstance(self._swaps, Runs) else RATE) * WIDTH / self._width()

    def _width(self) -> float:
        """How many inputs a layer has, the median over those that lose weights."""
        roles, held = weight_roles(self._model), named_tensors(self._model)
        weights = {name: held[name] for name in self._swaps.scaled() if held[name].dim() > 1}
        outputs = {name: roles[name].output if name in roles else 0 for name in weights}
        return median([weight.numel() / weight.shape[outputs[name]] for name, weight in weights.items()] or [WIDTH])

    def close(self) -> None:
        """Leaves the dense model as it was."""
        if self._hidden is not None:
            self._hidden.close()

    def facts(self) -> dict[str, Any]:
        """What the plan tells of its cost.

        Returns:
            ``tokens`` and ``steps``, the ``rate`` of the first one, ``seconds`` a step, and ``bytes`` a prunable weight beside
            the model and one batch: the ``copy`` that runs, and ``scores`` with what their optimizer remembers.
        """
        if self.learner is None:
            return {"tokens": 0, "steps": 0}
        found: dict[str, Any] = {"tokens": (self.done + self.looked) * self.tokens_a_step, "steps": self.done, "rate": self.rate}
        if self.done:
            weights = sum(self._live.dense[name].numel() for name in self._swaps.scaled())
            found["seconds"] = ranks.from_first(lambda: round(self.seconds / self.done, 6))
            found["bytes"] = {"copy": 4.0, "scores": round(self.learner.bytes() / weights, 3)}
        return found

    def _given(self, batches: Iterator[Sequence[Batch]]) -> tuple[float, float]:
        """The given mask's target on one batch, and on the samples that judge."""
        with self._showing(self._swaps.keep):
            one = sum(float(self._live.values(*self._referred(part, judged=True)).sum()) for part in next(batches))
            return ranks.total(one) / self._stream.batch_size, self._mean()

    def _start(self, batches: Iterator[Sequence[Batch]]) -> Tensor:
        """``magnitude^(1-p) × influence^p``, the influence by whole batches, ``(U,)``."""
        swaps, p = self._swaps, self._temper
        self._first.scale(lambda name: torch.ones((), device=self._first.dense[name].device))
        kinds = (self._first.dense[name].dtype for name in swaps.scaled())
        total = torch.zeros(len(swaps.keep), device=swaps.keep.device, dtype=reduce(torch.promote_types, kinds, torch.float32))
        fisher = FisherSum(swaps, self._first, total)
        for batch in islice(batches, self.looked):
            fisher.add(batch, self._stream.batch_size)
        layout = Layout.of(self._model)
        size_of = swaps.magnitude(layout.state(self._model).to(total))
        return swaps.per_weight(total).pow_(p / 2).mul_(size_of.pow_(1 - p))

    def _referred(self, batch: Batch, judged: bool = False) -> Batch:
        """The batch with the dense model's reference beside its labels, where the target compares with it.

        Args:
            judged: masks are judged by it, with no step: in the precision that the pruned model is computed in.
        """
        x, y = batch
        if not self._refers:
            return batch
        with torch.no_grad():
            with self._live.running(True if self._how.autocast == "reference" and not judged else None):
                outputs = run(self._dense, batch, self._task)
            if self._hidden is not None:
                return x, (self._hidden.reference(), y)
            full = torch.promote_types(outputs.dtype, torch.float32)
            return x, (self._task.reference(outputs.to(full)), y)

    def _show(self, keep: Tensor) -> None:
        self._live.scale(lambda name: self._swaps.factor(name, keep))

    @contextmanager
    def _showing(self, keep: Tensor) -> Iterator[None]:
        """While inside, the live model is the masked one with these units, to be judged and not learnt from."""
        self._show(keep)
        stand_in(self._live.function.model, self._swaps.stand_ins(keep))
        try:
            yield
        finally:
            stand_in(self._live.function.model, {})

    def _judged(self, keep: Tensor) -> float:
        with self._showing(keep):
            return self._mean()

    def _mean(self) -> float:
        total = 0.0
        for batch in self._accept:
            x, y = self._referred(to(batch, self._stream.device), judged=True)
            total += float(self._live.values(x, y).double().sum())
        return ranks.total(total) / self._judging


def _divergence(task: Task) -> Target:
    """The task's own; of classes, by as few passes over them as it takes."""
    if isinstance(task, Classification) and type(task).divergence is Classification.divergence:
        return partial(task.divergence_by, fused_kl)
    return task.divergence
