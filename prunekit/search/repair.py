"""Ways to a better mask of the same size, from a plan: a plain dict from name to function, for comparisons.

``refined`` is ``prunekit.refine``; ``swapped`` and ``learnt`` are its two stages alone; ``rescored`` of channels makes its own
plan in ten rounds; the others are the rivals, which take single weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.criteria import Evidence, compose, parse, score_evidence
from prunekit.errors import UsageError, nearest
from prunekit.plan import GROUPED, Plan
from prunekit.search.objective import make_objective
from prunekit.search.patterns import Weights
from prunekit.search.planner import Planner
from prunekit.search.refine import refine
from prunekit.search.rivals import RIVALS
from prunekit.search.schedule import Schedule, prune_by_schedule
from prunekit.trajectory import Layout

Batches = Sequence[tuple[Tensor, Tensor]]

RESCORED = "magnitude^0.5*taylor(target=margin,aggregation=l2)^0.5"
ROUNDS = 10


@dataclass(frozen=True)
class Material:
    """What a repair may look at.

    Attributes:
        evidence: of the dense model: its loss, its data, how it was trained.
        learn: samples to learn from.
        accept: samples of their own to accept on; None sets a quarter of ``learn`` apart.
        example: one or two inputs, for tracing.
        seed: of what is shuffled.
    """

    evidence: Evidence
    learn: Batches
    accept: Batches | None
    example: Tensor
    seed: int


Repair = Callable[[Plan, nn.Module, Material], Plan]


def _refined(plan: Plan, model: nn.Module, material: Material, *, rounds: int = 30, learn: bool = True) -> Plan:
    return refine(
        plan,
        model,
        material.learn,
        accept=material.accept,
        rounds=rounds,
        learn=learn,
        seed=material.seed,
        loss=material.evidence.loss,
    )


def _by_rival(plan: Plan, model: nn.Module, material: Material, *, name: str) -> Plan:
    pattern = Weights(plan, Layout.of(model), next(model.parameters()).device)
    objective = make_objective(
        model, material.learn, "kl", "margin", loss=material.evidence.loss, accept=material.accept, seed=material.seed
    )
    return pattern.plan(RIVALS[name](pattern, objective, material.seed))


def _rescored_units(plan: Plan, model: nn.Module, material: Material) -> Plan:
    """As many units of the same structure and allocation, by scores made anew in each of ten rounds."""
    x, y = (torch.cat([pair[i] for pair in material.learn]) for i in (0, 1))
    evidence = replace(material.evidence, x=x, y=y)
    spec = parse(RESCORED)
    scores = compose(spec, {part.text: score_evidence(evidence, part.text) for part in spec.singles})
    planner = Planner(evidence, scores, plan.structure, plan.provenance["allocation"], material.example)
    schedule = Schedule("iterative", rounds=ROUNDS)
    return prune_by_schedule(model, planner, plan.provenance["sparsity"], schedule).plan


COMMON: dict[str, Repair] = {
    "refined": _refined,
    "swapped": partial(_refined, learn=False),
    "learnt": partial(_refined, rounds=0),
}
"""Of every structure."""

REPAIRS: dict[str, Repair] = {**COMMON, **{name: partial(_by_rival, name=name) for name in RIVALS}}


def get_repair(name: str, structure: str) -> Repair:
    """The way ``name`` to repair plans of ``structure``.

    Raises:
        UsageError: there is none.
    """
    known = dict(COMMON)
    if structure == "unstructured":
        known = REPAIRS
    elif structure in GROUPED:
        known["rescored"] = _rescored_units
    if name not in known:
        raise UsageError(f"repair {name!r} does not exist for {structure}; {nearest(name, list(known))}")
    return known[name]
