"""Plans inside plans: what goes next of a model that has been pruned already, by scores of the model as it is by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.criteria import (
    Evidence,
    Scores,
    compose,
    gather,
    get_criterion,
    model_digest,
    parse,
    score_evidence,
    score_gathered,
)
from prunekit.plan import GROUPED, Plan, make_plan
from prunekit.repair.swaps import Swaps, swaps_inside
from prunekit.trajectory import Continued, Trajectory, load_into
from prunekit.trajectory.copies import copied

MakeSwaps = Callable[..., Swaps]
"""``(plan, layout, device, across=True) -> swaps``, as ``prunekit.repair.swaps.get_swaps``."""
Repair = Callable[[Plan, nn.Module, MakeSwaps | None], Plan]


@dataclass(frozen=True)
class _Shrinking(Scores):
    """Scores by which what is gone already goes first: its importance is 0, and any other's is above 0.

    Attributes:
        whole: the scores as they were found.
        masks: what stays by now.
    """

    whole: Scores | None = None
    masks: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, scores: Scores, masks: dict[str, Tensor]) -> _Shrinking:
        importance = {n: _above_zero(v, masks[n]) if n in masks else _above_zero(v) for n, v in scores.importance.items()}
        return cls(importance, scores.axis_sums, scores.provenance, scores.findings, scores.cost, scores.parts, scores, masks)

    def groups(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        assert self.whole is not None
        return {name: _above_zero(found, self._alive(groups[name])) for name, found in self.whole.groups(groups).items()}

    def _alive(self, members: Mapping[str, Tensor]) -> Tensor | None:
        assert self.masks is not None
        alive: Tensor | None = None
        for key, index in members.items():
            name, axis = key.rsplit("@", 1)
            if name in self.masks:
                here = self.masks[name].movedim(int(axis), 0)[index].flatten(1).any(1)
                alive = here if alive is None else alive | here
        return alive


def _above_zero(values: Tensor, alive: Tensor | None = None) -> Tensor:
    """Float64; importances of 0 become tiny, and where ``alive`` is False all become 0."""
    values = values.double()
    values = torch.where(values > 0, values, torch.full_like(values, 1e-60))
    return values if alive is None else torch.where(alive, values, torch.zeros_like(values))


class Planner:
    """Plans for one model, each inside the one before, by scores of the model as it is by then.

    A criterion of present weights scores the pruned model. One that needs a path scores the path so far: the dense
    model's training, the prunings and the fine-tuning steps; without fine-tuning there is nothing new on it, and the
    dense model's scores stand.

    Args:
        evidence: the dense model's.
        scores: the dense model's, by the criterion that all rounds use.
        example_inputs: one or two samples, for structures that need the model traced.
        options: further ones of ``make_plan``: ``ratios``, ``floor``, ``attention``.
        repair: refines every plan, ``(plan, model, swaps) -> plan``: ``model`` is the one in work, that the plan prunes;
            ``swaps`` holds swaps inside the plan before (None for the first), see ``prunekit.refine``.
    """

    def __init__(
        self,
        evidence: Evidence,
        scores: Scores,
        structure: str,
        allocation: str,
        example_inputs: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
        repair: Repair | None = None,
    ) -> None:
        self.evidence, self.first, self.options, self.repair = evidence, scores, dict(options or {}), repair
        self.structure, self.allocation, self.example_inputs = structure, allocation, example_inputs
        self.rescored = 0

    @classmethod
    def of(
        cls,
        trajectory: Trajectory,
        model: nn.Module,
        batches: Any = (),
        *,
        criterion: str = "magnitude",
        structure: str = "unstructured",
        allocation: str = "global",
        example_inputs: Any = None,
        options: Mapping[str, Any] | None = None,
        repair: Repair | None = None,
        **looking: Any,
    ) -> Planner:
        """A planner that scores by ``criterion``, now and in later rounds.

        Args:
            trajectory, model, batches, looking: as in ``prunekit.score``.
        """
        evidence = gather(trajectory, model, batches, **looking)
        scores = score_gathered(evidence, criterion)
        return cls(evidence, scores, structure, allocation, example_inputs, options, repair)

    @cached_property
    def singles(self) -> dict[str, Scores]:
        """The dense model's scores by criterion: one, or every part of a composition."""
        return {scores.criterion: scores for scores in leaves(self.first)}

    @cached_property
    def of_path(self) -> bool:
        """Whether scores look at the path, the fine-tuning steps on it included."""
        return any(get_criterion(name).needs_path for name in self.singles)

    def plan(self, model: nn.Module, sparsity: float, before: Plan | None = None, child: Trajectory | None = None) -> Plan:
        """What stays of ``model``, inside what ``before`` kept.

        Args:
            model: dense-shaped, as it is by now; left as it is.
            sparsity: share of all prunable parameters that is gone afterwards; more when more is gone already.
            child: the fine-tuning steps so far.
        """
        present = copied(self.evidence.model).cpu().eval()
        load_into(present, {k: v.cpu() for k, v in model.state_dict().items()}, Path("the model in work"))
        scores = self._scores(present, child)
        ranked = scores if before is None else _Shrinking.of(scores, before.masks())
        if before is not None and self.structure in GROUPED:
            sparsity = max(sparsity, before.sparsity()["prunable"])  # groups overshoot a little: what is gone stays gone
        plan = make_plan(
            ranked,
            present,
            self.example_inputs,
            sparsity=sparsity,
            structure=self.structure,
            allocation=self.allocation,
            **self.options,
        )
        plan.provenance["scores"] = scores.digest
        if before is not None:
            plan = replace(plan, keep={name: keep & before.keep[name] for name, keep in plan.keep.items()})
        if self.repair is None:
            return plan
        return self.repair(plan, present, None if before is None else partial(swaps_inside, before))

    def _scores(self, present: nn.Module, child: Trajectory | None) -> Scores:
        now = model_digest(present)
        if now == self.first.provenance["model"]:
            return self.first
        trajectory = self.evidence.trajectory
        if self.of_path and child is not None:
            trajectory = Continued(trajectory, child)
        evidence = replace(self.evidence, trajectory=trajectory, at=trajectory.layout.state(present))
        found, standing = {}, set()
        for name, scores in self.singles.items():
            if get_criterion(name).needs_path and child is None:
                standing.add(name)
                found[name] = replace(scores, provenance={**scores.provenance, "model": now})
            else:
                found[name] = score_evidence(evidence, name)
        self.rescored += not standing.issuperset(found)
        return compose(parse(self.first.criterion), found)


def leaves(scores: Scores) -> list[Scores]:
    """Scores of single criteria that ``scores`` are made of: themselves, unless they are a composition."""
    if "parts" not in scores.provenance:
        return [scores]
    return [leaf for part in scores.parts for leaf in leaves(part)]


class GivenPlan(Planner):
    """A finished plan, edited perhaps, in the place of one made from scores; for schedules of one pruning."""

    of_path = False

    def __init__(self, evidence: Evidence, plan: Plan) -> None:
        self.evidence, self.given, self.structure = evidence, plan, plan.structure

    def plan(self, model: nn.Module, sparsity: float, before: Plan | None = None, child: Trajectory | None = None) -> Plan:
        return self.given
