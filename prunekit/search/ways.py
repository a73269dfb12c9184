"""Ways to a better mask of the same size, from a plan: a plain dict from name to function, for comparisons.

``refined`` is ``prunekit.refine``; ``swapped`` and ``learnt`` are its two stages alone; ``rescored`` of units makes its own
plan in rounds, at refine's cost or in ten; the others are the rivals, which take single weights only. What learns from a stream
of fresh samples, or looks at layers, is in ``prunekit.search.streamed_ways``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from prunekit.apply.sums import SUMS
from prunekit.batch import Inputs
from prunekit.criteria import Evidence, compose, parse, score_evidence
from prunekit.data import Samples
from prunekit.errors import UsageError, nearest
from prunekit.plan import GROUPED, Plan
from prunekit.repair import together
from prunekit.repair.objective import make_objective
from prunekit.repair.refine import refine
from prunekit.repair.streamed import Streaming, usual_rates
from prunekit.repair.swaps import Weights
from prunekit.search.rivals import RIVALS
from prunekit.search.rivals.rescored import equal_cost
from prunekit.search.streamed_ways import CALIBRATION, RATES, REFIT, SHARE, TOGETHER, TUNED, WAYS, ways_for
from prunekit.steps.by_schedule import prune_by_schedule
from prunekit.steps.planner import Planner
from prunekit.steps.schedule import Schedule
from prunekit.structure import pattern_of
from prunekit.training.line_search import BATCHES, FACTOR
from prunekit.trajectory import Layout

RESCORED = "magnitude^0.5*taylor(target=margin,aggregation=l2)^0.5"
RESCORED_WITHOUT_MARGIN = "magnitude^0.5*taylor(aggregation=l2)^0.5"


@dataclass(frozen=True)
class RepairSamples:
    """What a repair may look at.

    Attributes:
        evidence: of the dense model: its loss, its data, how it was trained.
        learn: samples to learn from.
        accept: samples of their own to accept on; None sets a quarter of ``learn`` apart.
        example: the inputs of one or two samples, for tracing.
        seed: of what is shuffled.
        stream: how ways learn that take fresh samples in every step, and how long; None where there are none.
        given: the samples that these take; ``learn`` when None.
    """

    evidence: Evidence
    learn: Samples
    accept: Samples | None
    example: Inputs
    seed: int
    stream: Streaming | None = None
    given: Samples | None = None

    @property
    def train(self) -> Samples:
        """What streams are made of."""
        return self.learn if self.given is None else self.given


Found = Plan | tuple[Plan, nn.Module | None]
"""A plan; with the pruned model beside it where the way gives its weights other values too."""
Repair = Callable[[Plan, nn.Module, RepairSamples], Found]


def refine_plan(
    plan: Plan,
    model: nn.Module,
    material: RepairSamples,
    *,
    rounds: int = 30,
    learn: bool = True,
    reference: nn.Module | None = None,
) -> Plan:
    """``prunekit.refine`` with what a repair may look at, all rounds of it: every way gets as many gradients."""
    return refine(
        plan,
        model,
        material.learn,
        accept=material.accept,
        rounds=rounds,
        patience=None,
        learn=learn,
        seed=material.seed,
        task=material.evidence.task,
        reference=reference,
    )


def _by_rival(plan: Plan, model: nn.Module, material: RepairSamples, *, name: str) -> Plan:
    pattern = Weights(plan, Layout.of(model), next(model.parameters()).device)
    objective = make_objective(
        model,
        material.learn,
        "kl",
        material.evidence.task.importance(),
        task=material.evidence.task,
        accept=material.accept,
        seed=material.seed,
    )
    return pattern.plan(RIVALS[name](pattern, objective, material.seed))


def _rescored_units(plan: Plan, model: nn.Module, material: RepairSamples, *, most: int | None = None) -> Plan:
    """As many units of the same structure and allocation, by scores made anew in every round.

    A round costs one gradient of every sample to learn from; there are as many as ``refine`` takes of them, or ``most``, but
    none that could not remove a unit.
    """
    evidence = replace(material.evidence, data=material.learn)
    spec = parse(RESCORED if "margin" in evidence.task.targets() else RESCORED_WITHOUT_MARGIN)
    scores = compose(spec, {part.text: score_evidence(evidence, part.text) for part in spec.singles})
    planner = Planner(evidence, scores, plan.structure, plan.provenance["allocation"], material.example)
    gone = sum(int((~keep).sum()) for keep in plan.keep.values())
    schedule = Schedule("iterative", rounds=max(1, min(gone, most or equal_cost())))
    return prune_by_schedule(model, planner, plan.provenance["sparsity"], schedule).plan


COMMON: dict[str, Repair] = {
    "refined": refine_plan,
    "swapped": partial(refine_plan, learn=False),
    "learnt": partial(refine_plan, rounds=0),
}
"""Of every structure."""

REPAIRS: dict[str, Repair] = {**COMMON, **{name: partial(_by_rival, name=name) for name in RIVALS}}
"""Of single weights, wherever they are."""


def settings(name: str, structure: str) -> dict[str, Any]:
    """What decides a way's masks beside plan, model and material: a finished study measures it again when that changes."""
    if name == "rescored":
        return {"gradients": equal_cost()}
    if name in WAYS:
        return {
            "calibration": CALIBRATION,
            **({"rate": RATES[name.split("+")[0]]} if name.split("+")[0] in RATES else {}),
            **({"rates": usual_rates()} if {"streamed", TOGETHER} & set(name.split("+")) else {}),
            **({"sums": SUMS} if REFIT in name.split("+") else {}),
            **({"tuned": [BATCHES, FACTOR, SHARE]} if TUNED in name.split("+") else {}),
            **({"together": [BATCHES, FACTOR, together.HOLD]} if TOGETHER in name.split("+") else {}),
            **({"moved": [together.LENGTH, together.OF_LENGTH]} if name.endswith(f"+{TOGETHER}") else {}),
        }
    if name in COMMON and structure in GROUPED:
        return {"across": True, "importance": "margin"}
    return {}


def get_repair(name: str, structure: str) -> Repair:
    """The way ``name`` to repair plans of ``structure``.

    Raises:
        UsageError: there is none.
    """
    pattern = pattern_of(structure)
    known = {**COMMON, **ways_for(structure in GROUPED, pattern is not None and pattern.kind == "nm")}
    if structure == "unstructured":
        known |= REPAIRS
    elif structure in GROUPED:
        known |= {"rescored": _rescored_units, "rescored-10": partial(_rescored_units, most=10)}
    if name not in known:
        raise UsageError(f"repair {name!r} does not exist for {structure}; {nearest(name, list(known))}")
    return known[name]
