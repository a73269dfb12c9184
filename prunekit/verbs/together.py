"""Mask and weights of a run's model learnt together, and the pruned model that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from prunekit.plan import Plan
from prunekit.recipe import Prune
from prunekit.repair import learn_together, together
from prunekit.repair.streamed import Streaming
from prunekit.steps import cut
from prunekit.training.line_search import BATCHES, FACTOR
from prunekit.verbs.pruned_facts import summary
from prunekit.verbs.pruned_folder import write_pruned
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import validation_of


def learnt_together(run: Run, wanted: Prune, plan: Plan, tokens: int) -> tuple[Plan, nn.Module]:
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
            seed=run.recipe.seed,
            task=run.task,
        )
    finally:
        run.model.to(place)
    return found, model.to(place)


def together_request(wanted: Prune, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the model, for reuse."""
    rate = None if wanted.finetune is None else wanted.finetune.lr
    return {**asked, "together": {"rate": rate, "batches": BATCHES, "factor": FACTOR, "hold": together.HOLD}}


def write_together(
    run: Run, wanted: Prune, plan: Plan, model: nn.Module, asked: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes what ``learnt_together`` found, as ``prune_run`` does.

    Args:
        asked: what was asked for, without how it is learnt.
        facts: for the manifest.
    """
    request = together_request(wanted, asked)
    if plan.provenance["refine"]["ended"] == "interrupted":
        request["refine"] = {"ended": "interrupted"}  # so that it is not taken for what was asked
    plan.provenance["request"] = request
    folder = run.path / "pruned" / wanted.name
    told = write_pruned(
        run, cut(model, plan, run.example if plan.smaller else None), plan, folder, dict(facts), validation_of(run)
    )
    return {**summary(run, folder, plan), **told, "reused": False}
