"""Mask and weights of a run's model learnt together, and the pruned model that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from prunekit.plan import Plan
from prunekit.recipe import Prune
from prunekit.repair import learn_together, together
from prunekit.repair.streamed import Streaming, usual_rates
from prunekit.steps import cut
from prunekit.training.line_search import BATCHES, FACTOR
from prunekit.verbs.pruned_facts import summary
from prunekit.verbs.pruned_folder import write_pruned
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import validation_of


def learnt_together(run: Run, wanted: Prune, plan: Plan, tokens: int, start: nn.Module | None = None) -> tuple[Plan, nn.Module]:
    """``prunekit.repair.learn_together`` on the run's data and device."""
    place = next(run.model.parameters()).device
    try:
        run.model.to(run.device)
        found, model = learn_together(
            plan,
            run.model,
            run.batches("train"),
            Streaming(tokens=tokens),
            accept=run.batches("scoring", run.recipe.score.samples),
            rate=None if wanted.finetune is None else wanted.finetune.lr,
            start=start,
            seed=run.recipe.seed,
            task=run.task,
        )
    finally:
        run.model.to(place)
    return found, model.to(place)


def together_request(wanted: Prune) -> dict[str, Any]:
    """What decides how mask and weights are learnt, beside what is asked for."""
    rate = None if wanted.finetune is None else wanted.finetune.lr
    moved = {"moved": [together.LENGTH, together.OF_LENGTH], "rates": usual_rates()}
    return {"together": {"rate": rate, "batches": BATCHES, "factor": FACTOR, "hold": together.HOLD, **moved}}


def write_unrecorded(
    run: Run, wanted: Prune, plan: Plan, model: nn.Module, request: dict[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a plan and weights that were learnt without a recorded path, as ``prune_run`` does.

    Args:
        request: what decides them, for reuse.
        facts: for the manifest.
    """
    if plan.provenance.get("refine", {}).get("ended") == "interrupted":
        request["refine"] = {"ended": "interrupted"}  # so that it is not taken for what was asked
    plan = plan.saying(request=request)
    folder = run.path / "pruned" / wanted.name
    told = write_pruned(
        run, cut(model, plan, run.example if plan.smaller else None), plan, folder, dict(facts), validation_of(run)
    )
    return {**summary(run, folder, plan), **told, "reused": False}
