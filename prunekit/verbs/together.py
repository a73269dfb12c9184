"""Mask and weights of a run's model learnt together, and the pruned model that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.durable import replacing_folder
from prunekit.plan import Plan
from prunekit.recipe import Prune
from prunekit.repair import Recording, learn_together, together
from prunekit.repair.streamed import Streaming, usual_rates
from prunekit.steps import cut
from prunekit.training.line_search import BATCHES, FACTOR
from prunekit.verbs.pruned_facts import summary
from prunekit.verbs.pruned_folder import write_beside
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import validation_of


def learnt_together(
    run: Run, wanted: Prune, plan: Plan, tokens: int, start: nn.Module | None = None, folder: Path | None = None
) -> tuple[Plan, nn.Module]:
    """``prunekit.repair.learn_together`` on the run's data and device.

    Args:
        folder: where its states go; None for nowhere.
    """
    every = None if wanted.finetune is None else wanted.finetune.record_every
    place = next(run.model.parameters()).device
    with run.lent(run.model):
        found, model = learn_together(
            plan,
            run.model,
            run.batches("train"),
            Streaming(tokens=tokens),
            accept=run.batches("scoring", run.recipe.score.samples),
            rate=None if wanted.finetune is None else wanted.finetune.lr,
            start=start,
            record=None if folder is None else Recording(folder, run.trajectory, every),
            seed=run.recipe.seed,
            task=run.task,
        )
    return found, model.to(place)


def together_request(wanted: Prune) -> dict[str, Any]:
    """What decides how mask and weights are learnt, beside what is asked for."""
    rate = None if wanted.finetune is None else wanted.finetune.lr
    moved = {"moved": [together.LENGTH, together.OF_LENGTH], "rates": usual_rates()}
    return {"together": {"rate": rate, "batches": BATCHES, "factor": FACTOR, "hold": together.HOLD, **moved}}


def write_together(
    run: Run,
    wanted: Prune,
    request: dict[str, Any],
    learn: Callable[[Path], tuple[Plan, nn.Module]],
    told: Callable[[nn.Module], Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes plan and weights that were learnt in the same steps, and in ``trajectory/`` their path, as ``prune_run`` does.

    Args:
        request: what decides them, for reuse.
        learn: finds them, and records in the folder that it is given.
        told: facts for the manifest, of the model that was learnt.
    """
    folder = run.path / "pruned" / wanted.name
    with replacing_folder(folder) as temporary:
        plan, model = learn(temporary / "trajectory")
        if plan.provenance.get("refine", {}).get("ended") == "interrupted":
            request["refine"] = {"ended": "interrupted"}  # so that it is not taken for what was asked
        stream = plan.provenance["refine"]["stream"]
        facts = {
            **told(model),
            "finetune": {"together": True, "epochs": None, "steps": stream["steps"], "tokens": stream["tokens"]},
        }
        plan = plan.saying(request=request)
        small = cut(model, plan, run.example if plan.smaller else None)
        facts = write_beside(run, small, plan, temporary, facts, validation_of(run))
    return {**summary(run, folder, plan), **facts, "reused": False}
