"""Pruning in steps: scores taken anew in between, fine-tuning and rewinding, as a schedule says. Knows no recipe.

Masks only shrink, and the asked sparsity is what holds at the end. Refined again after fine-tuning (``prunekit.steps.again``), a
mask changes, but keeps its size.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekit.apply import apply_plan, prune
from prunekit.criteria import model_digest
from prunekit.errors import Note, PrunekitError, UsageError
from prunekit.plan import Plan
from prunekit.steps.again import RefineAgain, refine_again
from prunekit.steps.finetune import Finetuning, Tuner, forget
from prunekit.steps.planner import Planner
from prunekit.steps.schedule import Schedule, check_again, check_steps
from prunekit.structure.stand_ins import stand_in
from prunekit.trajectory import Trajectory, load_into, parent_facts
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.copies import copied

Start = Callable[[nn.Module, Plan], nn.Module]
"""A dense-shaped model of one's own, with weights for what the plan keeps, from a copy of the dense one."""


@dataclass(frozen=True)
class Figure:
    """A figure of a model by its name."""

    name: str
    of: Callable[[nn.Module], float]

    def __call__(self, model: nn.Module) -> float:
        return self.of(model)


@dataclass(frozen=True)
class Pruned:
    """What a schedule arrived at.

    Attributes:
        model: dense-shaped, what ``plan`` removes at exactly 0.
        plan: of the dense model: its provenance names the dense weights.
        rounds: one dict a round: ``asked``, ``sparsity``, ``steps``, ``seed``, ``seconds``; with ``measure``
            ``accuracy_pruned`` and ``accuracy`` (before and after fine-tuning); of a refined plan ``refined``: divergences
            ``before`` and ``after``, units ``changed``, how it ``ended``; of a round that refined again also ``again``, its
            number. In such a round ``accuracy_pruned`` is of the new mask before it is trained.
    """

    model: nn.Module
    plan: Plan
    rounds: list[dict[str, Any]]


def prune_by_schedule(
    model: nn.Module,
    planner: Planner,
    sparsity: float,
    schedule: Schedule | None = None,
    *,
    how: Finetuning | None = None,
    rewind: int | None = None,
    end: int | None = None,
    recalibrate: Callable[[nn.Module], object] | None = None,
    folder: str | Path | None = None,
    measure: Figure | Callable[[nn.Module], float] | None = None,
    again: RefineAgain | None = None,
    start: Start | None = None,
) -> Pruned:
    """Prunes ``model`` (left as it is) along a schedule.

    Args:
        how: fine-tunes after every round (``gradual``: throughout); None only prunes.
        rewind: after every pruning, the weights that stay take the values that they had before this step of the dense
            model's training, and training goes on from that step: same order of samples, same rates, up to ``how``'s last
            step, or ``end`` if that is earlier. ``how`` must then be the dense training. Momenta start empty.
        recalibrate: sets BatchNorm statistics anew, after a pruning and at the end.
        folder: where fine-tuning steps are recorded, as a child of the planner's trajectory. With ``rewind`` only the last
            round's are: the earlier ones chose masks, but no weight of the final model comes from them.
        measure: a figure of a model on validation data, told of every round.
        again: how many times more to refine and fine-tune after the last round; the mask keeps its size, but all that was ever
            removed may come back, with its dense value.
        start: what fine-tuning begins from after one pruning, in the place of the dense model's weights: compensated ones, or
            those that a layer-wise method found. The path has a straight piece to there.

    Raises:
        UsageError: a schedule or step that does not exist, or ``start`` where nothing is trained from one pruning.
        NonFiniteError: fine-tuning went to NaN or Inf.

    Example:
        >>> import torch
        >>> from prunekit import Finetuning, Planner, Schedule, Trajectory, prune_by_schedule
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> y = x[:, 0].gt(0).long()
        >>> how = Finetuning(lambda at: (x[at], y[at]), 64, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), epochs=1)
        >>> planner = Planner.of(Trajectory.of(model), model, [(x, y)], criterion="taylor")
        >>> done = prune_by_schedule(model, planner, 0.75, Schedule("iterative", rounds=2), how=how)
        >>> [round(found["sparsity"], 2) for found in done.rounds]
        [0.5, 0.75]
    """
    schedule = schedule or Schedule()
    schedule.check(None if how is None else how.steps)
    check_steps(planner.structure, schedule.name)
    trajectory = planner.evidence.trajectory
    if rewind is not None:
        if how is None or schedule.name == "gradual":
            raise UsageError("rewind needs fine-tuning, by rounds (schedule one-shot or iterative)")
        if how.lora is not None:
            raise UsageError("rewind trains on as the dense training did, which moved every weight; leave lora out")
        trajectory.pieces_until(rewind)
        if not 0 <= rewind < how.steps:
            raise UsageError(f"rewind is {rewind}; training has steps 0 to {how.steps - 1}")
        if end is not None and end > how.steps:
            warnings.warn(
                f"rewind: {end - rewind} steps were asked for, {how.steps - rewind} are left from step {rewind} to the dense "
                f"training's end ({how.steps}) and are taken",
                Note,
                stacklevel=2,
            )
    if start is not None and (schedule.name != "one-shot" or how is None or rewind is not None):
        raise UsageError("start is what fine-tuning begins from after one pruning; leave out other schedules and rewind")
    if again is not None and again.rounds:
        check_again(schedule.name, how is not None, rewind is not None)
    if how is not None:
        how.adapted(model, planner.evidence.prunable)  # refused before a plan is made
    figure = measure if measure is None or isinstance(measure, Figure) else Figure("accuracy", measure)
    work = _Work(copied(model), planner, sparsity, schedule, how, recalibrate, folder, figure, again, model, start)
    if schedule.name == "gradual":
        plan = work.gradual()
    elif how is None:
        plan = work.without_training()
    elif rewind is None:
        plan = work.by_rounds()
    else:
        plan = work.rewound(rewind, end)
    plan.provenance["model"] = model_digest(model)
    plan.provenance["trajectory"] = trajectory.hash
    plan.provenance["sparsity"] = sparsity
    return Pruned(work.model.cpu().eval(), plan, work.rounds)


def cut(model: nn.Module, plan: Plan, example_inputs: Tensor | None = None) -> nn.Module:
    """The pruned model of a masked, fine-tuned one: masked again for single weights, truly smaller for groups.

    Raises:
        PrunekitError: ``model`` has weights other than 0 where the plan removes them.

    Example:
        >>> import torch
        >>> from prunekit import Planner, Trajectory, cut, prune_by_schedule
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(2, 4)
        >>> planner = Planner.of(Trajectory.of(model), model, structure="channels", example_inputs=x)
        >>> done = prune_by_schedule(model, planner, 0.5)
        >>> cut(done.model, done.plan, x)[0].out_features
        4
    """
    named = named_tensors(model)
    for name, mask in plan.masks().items():
        if bool((named[name].detach().cpu()[~mask] != 0).any()):
            raise PrunekitError(f"{name} has weights other than 0 where the plan removes them; train with masks held")
    return prune(model, plan.saying(model=model_digest(model)), example_inputs)


@dataclass
class _Work:
    """The model in work and what every kind of schedule does with it."""

    model: nn.Module
    planner: Planner
    sparsity: float
    schedule: Schedule
    how: Finetuning | None
    recalibrate: Callable[[nn.Module], object] | None
    folder: str | Path | None
    measure: Figure | None
    again: RefineAgain | None
    dense: nn.Module
    start: Start | None = None

    def __post_init__(self) -> None:
        self.targets = self.schedule.sparsities(self.sparsity)
        self.rounds: list[dict[str, Any]] = []
        self.plan: Plan | None = None
        self._started = time.perf_counter()

    def without_training(self) -> Plan:
        for target in self.targets:
            self.plan = self.planner.plan(self.model, target, self.plan)
            apply_plan(self.model, self.plan)
            self._recalibrate()
            self._note(target, self._figure())
        return self._done()

    def by_rounds(self) -> Plan:
        """Every round starts where the last one ended; one recording holds them all."""
        self.plan = self.planner.plan(self.model, self.targets[0])
        if self.start is not None:
            self.model = self.start(self.model, self.plan)
        apply_plan(self.model, self.plan)
        self._recalibrate()
        with self._tuner(self.plan.masks(), None) as tuner:
            for number, target in enumerate(self.targets):
                if number:
                    self.plan = self.planner.plan(self.model, target, self.plan, self._child(tuner))
                    tuner.shrink(self.plan.masks())
                    stand_in(self.model, self.plan.stand_ins())
                    tuner.set(self._recalibrate)
                self._train(tuner, number, self._figure(), target)
            for number in range(len(self.targets), self._trainings):
                self._refine_again(tuner)
                tuner.set(self._recalibrate)
                self._train(tuner, number, self._figure(), self.targets[-1])
        return self._done()

    def _train(self, tuner: Tuner, number: int, pruned: float | None, target: float) -> None:
        seed = tuner.how.seed + number
        tuner.run(seed, stage=self._stage(number))
        if number == self._trainings - 1:
            tuner.set(self._recalibrate)
        self._note(target, pruned, tuner.how.steps, seed, max(0, number - len(self.targets) + 1))
        if tuner.how.rate is not None:
            self.rounds[-1]["rate"] = tuner.rates[-1]

    def _refine_again(self, tuner: Tuner) -> None:
        assert self.plan is not None
        assert self.again is not None
        self.plan = refine_again(tuner, self.plan, self.dense, self.again.refined)

    @property
    def _trainings(self) -> int:
        return len(self.targets) + (self.again.rounds if self.again else 0)

    def rewound(self, step: int, end: int | None) -> Plan:
        """Every round starts at the same early weights; the last one's recording is kept."""
        trajectory, child = self.planner.evidence.trajectory, None
        for number, target in enumerate(self.targets):
            self.plan = self.planner.plan(self.model, target, self.plan, child)
            masks = self.plan.masks()
            ended = copied(self.model)
            apply_plan(ended, self.plan)
            pruned = self._figure(ended)
            load_into(self.model, trajectory.model_state(step), trajectory.folder)
            if self.folder is not None:
                forget(self.folder)
            stand_in(self.model, self.plan.stand_ins())
            with self._tuner(masks, step) as tuner:
                tuner.run(begin=step, end=end, stage=self._stage(number))
                if number == len(self.targets) - 1:
                    tuner.set(self._recalibrate)
                steps = min(tuner.how.steps, end or tuner.how.steps) - step
            child = tuner.so_far()
            self._note(target, pruned, steps, tuner.how.seed)
        return self._done()

    def gradual(self) -> Plan:
        """One run of fine-tuning, pruned at even distances."""
        assert self.how is not None
        how, every = self.how, self.schedule.spread(self.how.steps)
        with self._tuner({}, None) as tuner:

            def after_step(steps: int) -> None:
                target = self.schedule.due(steps, how.steps, self.sparsity)
                if target is None:
                    return
                self.plan = self.planner.plan(self.model, target, self.plan, self._child(tuner))
                before = self._figure() if self.rounds else None
                if before is not None:
                    self.rounds[-1][self._name] = before
                tuner.shrink(self.plan.masks())
                stand_in(self.model, self.plan.stand_ins())
                self._note(target, self._figure(), every, tuner.how.seed)

            tuner.run(after_step=after_step, stage="fine-tune and prune")
            tuner.set(self._recalibrate)
            self.rounds[-1]["steps"] += self.how.steps - every * len(self.targets)
            self.rounds[-1][self._name] = self._figure()
        return self._done()

    def _tuner(self, masks: dict[str, Tensor], step: int | None) -> Tuner:
        assert self.how is not None
        facts = {**parent_facts(self.planner.evidence.trajectory, step), "schedule": self.schedule.name}
        return Tuner(self.model, masks, self.how, self.folder, facts, self.planner.evidence.prunable)

    def _child(self, tuner: Tuner) -> Trajectory | None:
        return tuner.so_far() if self.planner.of_path else None

    def _stage(self, number: int) -> str:
        many = self._trainings
        return "fine-tune" if many == 1 else f"fine-tune (round {number + 1} of {many})"

    def _recalibrate(self) -> None:
        if self.recalibrate is not None:
            self.recalibrate(self.model)
            if self.plan is not None:
                apply_plan(self.model, self.plan)

    def _figure(self, model: nn.Module | None = None) -> float | None:
        return None if self.measure is None else self.measure(self.model if model is None else model)

    @property
    def _name(self) -> str:
        return "" if self.measure is None else self.measure.name

    def _note(self, asked: float, pruned: float | None, steps: int = 0, seed: int | None = None, again: int = 0) -> None:
        assert self.plan is not None
        now = time.perf_counter()
        facts: dict[str, Any] = {"asked": asked, "sparsity": self.plan.sparsity()["prunable"], "steps": steps}
        if pruned is not None:
            facts |= {f"{self._name}_pruned": pruned, self._name: self._figure()}
        refined = self.plan.provenance["refine_again"][-1] if again else self.plan.provenance.get("refine")
        if again:
            facts["again"] = again
        if refined:
            facts["refined"] = {key: refined[key] for key in ("before", "after", "changed", "ended")}
        self.rounds.append({**facts, "seed": seed, "seconds": round(now - self._started, 3)})
        self._started = now

    def _done(self) -> Plan:
        assert self.plan is not None
        return self.plan
