"""Explain the pruning, then repair it: the removed weights that pruning's damage is due to come back, others leave.

Pruning is one straight segment of the path, so the divergence it causes is, exactly, a sum over what it removed
(``prunekit.kernel.blame``). A mask is learnt along that segment (``prunekit.repair.learn``). Then a round gives the
most-blamed units back, drops as many of the least important ones of the model as it is then, and is kept if the divergence
falls on samples of their own. No weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply import check_made_for
from prunekit.errors import UsageError, nearest
from prunekit.kernel import blame
from prunekit.kernel.blame import add_up
from prunekit.kernel.gradients import MomentEngine
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.repair.deadline import Deadline, OutOfTime
from prunekit.repair.learn import learnt_masks, mask_gradient
from prunekit.repair.objective import STREAMED, Objective, make_objective
from prunekit.repair.record import Record
from prunekit.repair.streamed import Streaming, StreamLearning, parts_of
from prunekit.repair.swaps import Swaps, get_swaps
from prunekit.task import Target, Task
from prunekit.task.settle import settle
from prunekit.trajectory import Layout, Segment

SHRINK = 0.6  # of the share that is swapped, after a round that did not help
WORTHWHILE = 0.01  # of the divergence: what rounds have to gain together for the search to go on
FEW = 0.02  # of the number kept: a round that swaps more and does not help says nothing about fewer


@dataclass(frozen=True)
class RefineOptions:
    """How long ``refine`` looks, and how.

    Attributes:
        rounds: of swaps, at most. Fewer when there is nothing left to try.
        patience: rounds, each of 2 % of the number kept at most, that may gain less than 1 % together before the search ends.
            None for all ``rounds``.
        budget_seconds: stops at the first evaluation of the model that ends after so long, start-up included (the dense
            outputs, and how good the plan is); what was being tried then is left. With a budget the plan depends on the
            machine's speed; without one, the same seed gives the same plan.
        learn: before the swaps, learn a mask for ``steps`` steps from the tempered importances of the dense model
            (``prunekit.repair.learn``); swaps go on from the better of that mask and the plan's.
        share: of the number kept that the first round swaps.
        temper: p of ``magnitude^(1-p) × influence^p``, the importance of what may leave.
        nodes: midpoints of the pruning segment for blame.
        accept_share: of the samples, set apart to accept on where none of their own are given, in (0, 1).
        stream: learn a mask from a stream of the samples instead, and no more (``prunekit.repair.streamed``): for models and data
            too large to look at every sample's gradient, or twice at any. ``rounds``, ``patience``, ``learn``, ``steps``,
            ``share`` and ``nodes`` say nothing then.

    Raises:
        UsageError: one is out of range.
    """

    rounds: int = 30
    patience: int | None = 6
    budget_seconds: float | None = None
    learn: bool = True
    steps: int = 300
    share: float = 0.1
    temper: float = 0.5
    nodes: int = 8
    accept_share: float = 0.25
    stream: Streaming | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rounds", 0, math.inf),
            ("patience", 1, math.inf),
            ("nodes", 1, math.inf),
            ("steps", 1, math.inf),
            ("temper", 0, 1),
            ("share", 0, 1),
            ("budget_seconds", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is None and name in ("budget_seconds", "patience"):
                continue
            whole = name in ("rounds", "patience", "nodes", "steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise UsageError(f"refine: {name} is {value!r}; it must be a {'whole ' if whole else ''}number")
            if not low <= value <= high:
                raise UsageError(f"refine: {name} is {value}; it must be from {low} to {high}".replace(" to inf", " upwards"))


def _options(options: RefineOptions | None, changes: Mapping[str, Any]) -> RefineOptions:
    known = [each.name for each in fields(RefineOptions)]
    for name in changes:
        if name not in known:
            raise UsageError(f"refine: option {name!r} does not exist; {nearest(name, known)}")
    if options is not None and not isinstance(options, RefineOptions):
        raise UsageError(f"refine: options are {type(options).__name__}; give RefineOptions, or single ones by name")
    return replace(options or RefineOptions(), **changes)


@dataclass(kw_only=True)
class _Best(Record):
    """The best mask so far and how it came about, and what candidates are measured by."""

    swaps: Swaps
    objective: Objective

    def offer(self, candidate: Tensor, facts: dict[str, Any]) -> bool:
        """Measures ``candidate``, and takes it if it is better on the accept part."""
        factors = self.swaps.expand(candidate.to(self.objective.theta.dtype))
        ranks.alike("refine: the mask", candidate)
        return self.judge(candidate, self.objective.on_learn(factors), self.objective.on_accept(factors), facts)

    def line(self, what: str) -> str:
        return f"{what}: divergence {self.accept:.4g}, {self.history[-1]['swapped']:,} swapped last"


def refine(
    plan: Plan,
    model: nn.Module,
    batches: Any,
    options: RefineOptions | None = None,
    *,
    task: str | Task | None = None,
    target: str | Target = "kl",
    seed: int = 0,
    importance: str | Target | None = None,
    loss: Any = None,
    accept: Any = None,
    swaps: Callable[[Plan, Layout, torch.device], Swaps] | None = None,
    reference: nn.Module | None = None,
    **changes: Any,
) -> Plan:
    """The plan with as many units kept, but better ones; never worse than ``plan`` on the samples it is accepted on.

    Args:
        plan: made for ``model``; any criterion, also edited or refined before.
        model: the trained dense model; left as it is. It is computed with on its own device.
        batches: samples to learn from: batches ``(inputs, labels)`` or mappings with labels among them, a data set, or a
            ``DataLoader``.
        options, changes: how long and how it looks, and what is other than there: ``refine(…, rounds=5)``; see
            ``RefineOptions``.
        task: what the model is for, a name from ``prunekit.task.TASKS`` or a ``Task``; None where samples leave no doubt.
        target: what is lowered: ``"kl"``, the task's divergence from the dense model (KL of classes, squared distance of
            numbers; labels are not looked at), ``"loss"`` on the labels, or a function ``(outputs, labels) -> (samples,
            targets)``, lower is better.
        seed: of the split of the samples, and of batches while learning.
        importance: target whose per-sample gradients give that influence; by default the margin, where the task has one,
            or ``target`` if it is a function.
        loss: for the target ``"loss"``; the task's own when None.
        accept: samples of their own to accept on; without them a share of ``batches`` is set apart for that.
        swaps: which swaps are allowed; by the plan's structure when None (``prunekit.search.SWAPS``).
        reference: stay close to this model's outputs instead of ``model``'s own: the dense one, where ``model`` has the kept
            weights as they were trained since (``prunekit.steps.again``). Then ``J`` is not 0 at ``model``; sums of blame
            are what the mask adds.

    Returns:
        A plan whose ``history`` tells every round: ``learn`` and ``accept`` divergence, units ``swapped``, ``ranked`` by
        what, ``share``, whether it was ``kept``, and blame's ``residual``; ``provenance["refine"]["moved"]`` says how many
        units came ``back`` and went ``out``, by parameter or layer. Ctrl-C ends the search, not the call: the best
        plan so far is returned, and its provenance says so.

    Raises:
        ArtifactError: the plan was made for other weights.
        UsageError: an option out of range, too few samples, or a structure that cannot be refined.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, make_plan, refine, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> x = torch.randn(64, 4)
        >>> better = refine(plan, model, [(x, model(x).argmax(1))], rounds=5, steps=20)
        >>> found = better.provenance["refine"]
        >>> found["after"]["accept"] <= found["before"]["accept"] and found["kept"] == 24
        True
    """
    how = _options(options, changes)
    deadline = Deadline(how.budget_seconds)
    check_made_for(plan, model)
    plan.only_zeros("refine", choosing=how.stream is not None)
    device = next(model.parameters()).device
    layout = Layout.of(model)
    chosen = get_swaps(plan, layout, device) if swaps is None else swaps(plan, layout, device)
    kind, samples = settle(model, batches, task, loss)
    if how.stream is not None:
        if isinstance(target, str) and target not in STREAMED:
            raise UsageError(f"refine: target {target!r} does not exist; {nearest(target, list(STREAMED))}, or a function")
        parts = parts_of(samples, accept, kind, how.accept_share, seed)
        learning = StreamLearning(
            chosen, model, *parts, how.stream, task=kind, target=target, temper=how.temper, seed=seed, deadline=deadline,
            reference=reference,
        )  # fmt: skip
        return learning.learnt(plan)
    ranking = importance or (kind.importance() if isinstance(target, str) else target)
    objective = make_objective(
        model,
        samples or (),
        target,
        ranking,
        task=kind,
        accept=accept,
        accept_share=how.accept_share,
        seed=seed,
        reference=reference,
    )
    factors = chosen.expand(chosen.keep.to(objective.theta.dtype))
    best = _Best(
        keep=chosen.keep,
        learn=objective.on_learn(factors),
        accept=objective.on_accept(factors),
        swaps=chosen,
        objective=objective,
    )
    best.objective = objective.watched(deadline)
    ended = "done"
    try:
        if not bool(chosen.keep.all()) and bool(chosen.keep.any()):
            in_time = not how.learn or _learn(best, how, seed, deadline)
            ended = _swap(best, how, deadline) if in_time else "budget"
    except OutOfTime:
        ended = "budget"
    except KeyboardInterrupt:
        if ranks.size() > 1:  # each is somewhere else, and none can wait for the others
            raise
        ended = "interrupted"
    told = {key: getattr(how, key) for key in ("rounds", "patience", "learn", "steps", "share", "temper", "nodes")}
    return best.plan(
        plan,
        chosen,
        target=target,
        samples=(objective.learn.samples, objective.accept.samples),
        ended=ended,
        options={**told, "seed": seed},
    )


def _swap(best: _Best, how: RefineOptions, deadline: Deadline) -> str:
    """The rounds of give back and drop; returns what ended them."""
    swaps, objective, share = best.swaps, best.objective, how.share
    theta, dtype = objective.theta, objective.theta.dtype
    engine = objective.engine()
    tried = torch.zeros_like(best.keep)  # single units that did not help, since the mask last changed
    after = [best.accept]  # every round that counts for patience
    with Bar("refine", how.rounds) as bar:
        for number in range(1, how.rounds + 1):
            if deadline.passed:
                return "budget"
            ranked = _ranking(number)
            facts: dict[str, Any] = {"stage": "refine", "round": number, "ranked": ranked, "share": share}
            if ranked == "blame":
                pruned = theta * swaps.expand(best.keep.to(dtype))
                step = Segment(0, theta, pruned, torch.zeros_like(theta))
                found = blame(objective.function, step, objective.learn, nodes=how.nodes)
                gain, facts["residual"] = swaps.gather(found.values, best.keep), found.residual
            else:
                gain = _gain(best)
            grown = swaps.grow(best.keep, gain.masked_fill(tried, -torch.inf), share)
            if bool((grown == best.keep).all()):
                return "done"  # nothing is left to try
            worth = _worth(best, engine, grown, how.temper)
            back = grown & ~best.keep
            if best.offer(swaps.exchange(worth, grown, gain), facts):
                tried.zero_()
            else:
                share *= SHRINK
                if share * swaps.count < 1:
                    tried |= back
            bar.describe(best.line(f"refine, round {number}"))
            bar.advance()
            if best.history[-1]["swapped"] <= FEW * int(best.keep.sum()):
                after.append(best.accept)
            if how.patience and len(after) > how.patience and best.accept > (1 - WORTHWHILE) * after[-1 - how.patience]:
                return "patience"
    return "done"


def _worth(best: _Best, engine: MomentEngine, keep: Tensor, temper: float) -> Tensor:
    """``magnitude^(1-p) × influence^p`` of every unit in the model that keeps ``keep``, ``(U,)``."""
    swaps, objective = best.swaps, best.objective
    present = objective.theta * swaps.expand(keep.to(objective.theta.dtype))
    influence = swaps.influence(objective.ranking, engine, present, objective.labelled)
    return influence.pow(temper) * swaps.magnitude(objective.theta).pow(1 - temper)


def _ranking(number: int) -> str:
    """What ranks the removed units in a round (the ablation of benchmarks/refine.py puts others in its place)."""
    return "blame" if number % 2 else "gain"


def _gain(best: _Best) -> Tensor:
    """How much J falls, to first order at the pruned model, when a unit returns: ``-∂J/∂m``, ``(U,)``."""
    swaps, objective = best.swaps, best.objective
    mask = best.keep.to(objective.theta.dtype).requires_grad_()
    gain = torch.zeros_like(mask, requires_grad=False)
    for x, y in objective.learn:
        gain -= mask_gradient(objective, swaps, mask, x, y, objective.learn.samples)
    add_up(objective.learn, gain)
    return gain


def _learn(best: _Best, how: RefineOptions, seed: int, deadline: Deadline) -> bool:
    """Learnt masks, judged as they come; False when time ran out."""
    if deadline.passed:
        return False
    objective = best.objective
    engine = objective.engine()
    worth = _worth(best, engine, torch.ones_like(best.keep), how.temper)
    with Bar("learn", how.steps) as bar:
        done = 0
        for step, candidate in learnt_masks(best.swaps, objective, worth, steps=how.steps, seed=seed):
            best.offer(candidate, {"stage": "learn", "round": step, "ranked": "scores"})
            bar.describe(best.line(f"learn, step {step}"))
            bar.advance(step - done)
            done = step
            if deadline.passed:
                return False
    return True
