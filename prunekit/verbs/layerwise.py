"""Layer-wise pruning of a run's model: mask and weights from its training samples, as compensation takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from prunekit.apply import masked
from prunekit.errors import UsageError
from prunekit.layerwise import METHODS, prune_layerwise
from prunekit.plan import Plan
from prunekit.recipe import Layerwise, Prune
from prunekit.verbs.refining import refining, refining_request
from prunekit.verbs.run_folder import Run


def by_layers(run: Run, asked: Layerwise, wanted: Prune) -> tuple[Plan, nn.Module]:
    """The plan and the pruned model; where the plan is refined, which looks for a mask of the dense weights, with those."""
    plan, model = prune_layerwise(
        run.model,
        run.batches("train", asked.samples),
        sparsity=wanted.sparsity,
        structure=wanted.structure,
        ignore=run.recipe.prunable.ignore,
        include=run.recipe.prunable.include,
        device=run.device,
        task=run.task,
        **asked.options(),
    )
    plan = replace(plan, provenance={**plan.provenance, "trajectory": run.trajectory.hash})
    if wanted.repair is None:
        return plan, model
    plan = refining(run, wanted.repair)(plan)
    return plan, masked(run.model, plan)


def layerwise_request(run: Run, asked: Layerwise, wanted: Prune) -> dict[str, Any]:
    """What decides the pruned model, for reuse."""
    return {
        "criterion": asked.method,
        "layerwise": {**asked.model_dump(mode="json", exclude={"activations"}), "train": run.splits["train"].digest()},
        "sparsity": wanted.sparsity,
        "structure": wanted.structure,
        **({"refine": refining_request(run, wanted.repair)} if wanted.repair is not None else {}),
    }


def refuse_without_weights(plan: Plan) -> None:
    """Raises UsageError for a plan whose method found weights with the mask: the plan alone does not hold them."""
    request = plan.provenance.get("request", {})
    method = request.get("layerwise", {}).get("method")
    if method in METHODS and METHODS[method].changes and not request.get("refine"):
        raise UsageError(
            f"--apply: the plan was made with --layerwise {method}, which finds new weights with the mask, and plans hold none; "
            f"prune with --layerwise {method} again"
        )
