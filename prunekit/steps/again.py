"""Refine what was fine-tuned again, among its trained weights and the dense values of the removed ones.

Between fine-tuning and a new mask the model is

    θ_B = m ⊙ θ_tuned + (1 - m) ⊙ θ_dense

with the mask ``m`` that is in force, so that ``m ⊙ θ_B`` is the model as it is. ``prunekit.refine`` takes that mask as its plan
and θ_B as its model, and stays close to the dense model's outputs. ``J(m ⊙ θ_B) - J(θ_B) = Σ_{i removed} blame_i`` still holds,
though ``J(θ_B)`` is no longer 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from prunekit.criteria import model_digest
from prunekit.plan import Plan
from prunekit.steps.finetune import Tuner
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.copies import copied

RefineFrom = Callable[[Plan, nn.Module, nn.Module], Plan]
"""``(plan, θ_B, dense model) -> plan``: ``prunekit.refine`` with the dense model as its ``reference``."""


@dataclass(frozen=True)
class RefineAgain:
    """Refine again, then fine-tune: ``rounds`` times, by ``refined``."""

    rounds: int
    refined: RefineFrom


@torch.no_grad()
def returning(model: nn.Module, dense: nn.Module, plan: Plan) -> nn.Module:
    """θ_B, on the CPU: a copy of the masked ``model`` in which everything that ``plan`` removes has its value in ``dense``."""
    base = copied(model).cpu().eval()
    named, values = named_tensors(base), named_tensors(dense)
    for name, mask in plan.masks().items():
        named[name].copy_(torch.where(mask, named[name], values[name].to(named[name])))
    return base


def refine_again(tuner: Tuner, plan: Plan, dense: nn.Module, refined: RefineFrom) -> Plan:
    """Refines what ``tuner`` has trained, and lets it go on with the new mask: what comes back has its dense value.

    Returns:
        the new plan. ``given`` and ``provenance["refine"]`` tell of the refinement before fine-tuning, as before, and
        ``provenance["refine_again"]`` has one entry more: what ``refine`` says of this one.
    """
    base = returning(tuner.model, dense, plan)
    facts = {key: value for key, value in plan.provenance.items() if key != "refine"}
    found = refined(replace(plan, provenance={**facts, "model": model_digest(base)}), base, dense)
    tuner.swap(found.masks(), named_tensors(dense))
    told = {**found.provenance["refine"], "from": plan.digest}
    return replace(
        plan, keep=found.keep, provenance={**plan.provenance, "refine_again": [*plan.provenance.get("refine_again", []), told]}
    )
