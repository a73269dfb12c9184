"""Layer-wise pruning of a run's model: mask and weights from its training samples, as compensation takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from prunekit.apply import masked
from prunekit.criteria import expand
from prunekit.errors import UsageError
from prunekit.layerwise import METHODS, prune_layerwise
from prunekit.plan import Plan, asked_sparsity, make_plan
from prunekit.recipe import Layerwise, Prune
from prunekit.reusing import reusable
from prunekit.steps import GivenPlan
from prunekit.trajectory.copies import copied
from prunekit.verbs.planning import training_request
from prunekit.verbs.pruned_facts import made_from, refuse_foreign, summary
from prunekit.verbs.pruned_folder import write_pruned
from prunekit.verbs.refining import refining, refining_request
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scheduling import prune_in_steps
from prunekit.verbs.tuning import check_room, check_training
from prunekit.verbs.validation import validation_of

NOTHING: Mapping[str, Any] = {}


def prune_by_layers(
    run: Run,
    asked: Layerwise,
    wanted: Prune,
    dry_run: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] = NOTHING,
    find: Callable[[], tuple[Plan, nn.Module]] | None = None,
    last: Callable[[nn.Module], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The pruned model written, as ``prune_run`` does; where it is fine-tuned, from the method's weights on.

    Args:
        facts: further ones for the manifest.
        find: gives what ``by_layers`` finds, a model that stays as it is; None finds it.
        last: further facts that are measured on a fine-tuned model.

    Raises:
        UsageError: a plan alone is wanted.
        ArtifactError: the folder holds something else.
    """
    if dry_run:
        raise UsageError("--dry-run writes a plan alone, and --layerwise finds new weights with it; leave one of them out")
    request = layerwise_request(run, asked, wanted)
    folder = run.path / "pruned" / wanted.name
    if reusable(folder, made_from(folder, False), request, overwrite):
        return {**summary(run, folder, Plan.load(folder / "plan.safetensors")), "reused": True}
    refuse_foreign(folder)
    check_training(run, wanted)
    check_room(run, wanted)
    plan, model = by_layers(run, asked, wanted) if find is None else find()
    if not wanted.trains:
        return write_by_layers(run, asked, wanted, plan, model, facts)
    _mark(request, plan)
    evidence = replace(run.evidence, prunable=tuple(plan.provenance["prunable"]))  # what LoRA adapts
    planner, sparsity = GivenPlan(evidence, plan), asked_sparsity(wanted.structure, wanted.sparsity)
    training = training_request(run, wanted)
    done = prune_in_steps(
        run, folder, planner, sparsity, wanted, training, request, facts, last=last, start=lambda *_: copied(model)
    )
    return {**summary(run, folder, Plan.load(folder / "plan.safetensors")), **done, "reused": False}


def write_by_layers(
    run: Run, asked: Layerwise, wanted: Prune, plan: Plan, model: nn.Module, facts: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """Writes what ``by_layers`` found."""
    request, folder = layerwise_request(run, asked, wanted), run.path / "pruned" / wanted.name
    _mark(request, plan)
    plan = plan.saying(request=request)
    told = write_pruned(run, model, plan, folder, dict(facts), validation_of(run))
    return {**summary(run, folder, plan), **told, "reused": False}


def _mark(request: dict[str, Any], plan: Plan) -> None:
    """Notes that refining was interrupted, so that the plan is not taken for what was asked."""
    if plan.provenance.get("refine", {}).get("ended") == "interrupted":
        request["refine"]["ended"] = "interrupted"


def by_layers(run: Run, asked: Layerwise, wanted: Prune) -> tuple[Plan, nn.Module]:
    """The plan and the pruned model; where the plan is refined, which looks for a mask of the dense weights, with those."""
    shares = shares_of(run, wanted)
    plan, model = prune_layerwise(
        run.model,
        run.batches("train", asked.samples),
        sparsity=wanted.sparsity if shares is None else None,
        shares=shares,
        structure=wanted.structure,
        ignore=run.recipe.prunable.ignore,
        include=run.recipe.prunable.include,
        device=run.device,
        task=run.task,
        **asked.options(),
    )
    plan = plan.saying(trajectory=run.trajectory.hash)
    if wanted.repair is None:
        return plan, model
    plan = refining(run, wanted.repair)(plan)
    return plan, masked(run.model, plan)


def shares_of(run: Run, wanted: Prune) -> Plan | None:
    """The plan that says how much of each layer goes; None where all lose the same share.

    Raises:
        ArtifactError: the criterion has not been scored.
        UsageError: its name stands for several.
    """
    if wanted.criterion == "auto":
        return None
    names = expand(wanted.criterion)
    if len(names) > 1:
        raise UsageError(
            f"{wanted.criterion} stands for {len(names)} criteria, and --layerwise takes one; name one of {', '.join(names)}"
        )
    return make_plan(
        run.scores(names[0]),
        run.model,
        sparsity=asked_sparsity(wanted.structure, wanted.sparsity),
        allocation=wanted.allocation or "global",
    )


def layerwise_request(run: Run, asked: Layerwise, wanted: Prune) -> dict[str, Any]:
    """What decides the pruned model, for reuse."""
    return {
        "criterion": asked.method,
        "layerwise": {**asked.model_dump(mode="json", exclude={"activations"}), "train": run.splits["train"].digest()},
        "sparsity": wanted.sparsity,
        **({} if wanted.criterion == "auto" else {"shares": [wanted.criterion, wanted.allocation or "global"]}),
        "structure": wanted.structure,
        **({"refine": refining_request(run, wanted.repair)} if wanted.repair is not None else {}),
        **training_request(run, wanted),
    }


def refuse_without_weights(plan: Plan) -> None:
    """Raises UsageError for a plan whose method found weights with the mask: the plan alone does not hold them."""
    request = plan.provenance.get("request", {})
    if "together" in request or "by_layers" in request:
        raise UsageError(
            "--apply: the plan's mask was learnt together with weights (--tokens), and plans hold none; prune with --tokens again"
        )
    method = request.get("layerwise", {}).get("method")
    if method in METHODS and METHODS[method].changes and not request.get("refine"):
        raise UsageError(
            f"--apply: the plan was made with --layerwise {method}, which finds new weights with the mask, and plans hold none; "
            f"prune with --layerwise {method} again"
        )
