"""prune: scores to a plan, and a plan to a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.apply import Manifest, check_made_for, squeeze
from prunekit.criteria import expand
from prunekit.errors import ArtifactError, UsageError
from prunekit.plan import Plan, asked_sparsity
from prunekit.recipe import DROPS, TIMES, Prune, Steps
from prunekit.reusing import reusable
from prunekit.steps import GivenPlan
from prunekit.task.evaluation import run as run_model
from prunekit.verbs.budgets import measured_again, within_budget
from prunekit.verbs.compensating import compensated, pruned_as_asked, start_of
from prunekit.verbs.dividing import (
    BOTH,
    LAYERS,
    LAYERS_TOGETHER,
    LAYERWISE,
    TOGETHER,
    ByLayers,
    LayersAreBetter,
    beside_layers,
    by_division,
    divide,
    earlier,
    fits_layers,
    layerwise_of,
    learnt,
    learnt_request,
    looks_again,
    tokens_left,
)
from prunekit.verbs.layerwise import prune_by_layers, refuse_without_weights, write_by_layers
from prunekit.verbs.planning import Planning, training_request, untrained
from prunekit.verbs.pruned_facts import made_from, refuse_foreign, summary
from prunekit.verbs.pruned_folder import read_plan, write_plan, write_pruned
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scheduling import prune_in_steps
from prunekit.verbs.scoring import score_run
from prunekit.verbs.together import write_together
from prunekit.verbs.tuning import check_room, check_training
from prunekit.verbs.validation import validation_of


def prune_run(
    run: Run,
    wanted: Prune,
    dry_run: bool = False,
    overwrite: bool = False,
    division: Mapping[str, Any] | None = None,
    last: Callable[[nn.Module], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Plans and prunes; with ``dry_run`` only the plan is written, to be looked at and edited.

    Args:
        division: how tokens were divided between mask and weights, for the manifest.
        last: further facts that are measured on the finished model.

    Raises:
        UsageError: a name or value that does not exist.
        ArtifactError: ``pruned/<name>`` holds something else.
        StructureError: the model cannot take the structure.
        PrunekitError: no plan meets the budget.
    """
    if wanted.layerwise is not None:
        return prune_by_layers(run, wanted.layerwise, wanted, dry_run, overwrite)
    check_training(run, wanted)
    names = [] if wanted.criterion == "auto" else expand(wanted.criterion)
    if wanted.classes:
        run = _for_classes(run, wanted.classes, names, overwrite)
    planning = Planning(run, wanted, names)
    folder = run.path / "pruned" / wanted.name
    if wanted.tokens is not None:
        if dry_run:
            raise UsageError("--dry-run shows a plan that is made at once; --tokens learns it, in tries first")
        return _by_tokens(run, wanted, planning, folder, overwrite)
    request = planning.request
    if reusable(folder, made_from(folder, dry_run), request, overwrite):
        return {**summary(run, folder, Plan.load(folder / "plan.safetensors")), "reused": True}
    if dry_run and wanted.schedule.name != "one-shot":
        raise UsageError(f"--dry-run shows a plan that is made at once; schedule {wanted.schedule.name} makes it on the way")
    if dry_run and wanted.repair is not None and wanted.repair.again:
        raise UsageError("--dry-run shows a plan that is made at once; refining again changes it after fine-tuning")
    refuse_foreign(folder)
    if not dry_run:
        check_room(run, wanted)
    facts: dict[str, Any] = {"division": dict(division)} if division else {}
    budget = wanted.budget[0]
    if budget:  # a repair keeps what the others measure, so only accuracy has to be measured with it
        made = planning.repaired_plan if budget in DROPS else planning.plan
        sparsity, facts = within_budget(run, wanted, planning.chosen, made, planning.planner)
    else:
        sparsity = asked_sparsity(wanted.structure, wanted.sparsity)
    chosen = planning.chosen(sparsity)
    if wanted.request() and not dry_run:
        if budget in TIMES and wanted.schedule.name != "one-shot":
            last = partial(measured_again, run, facts)  # its plans are others than the search's
        training, planner, again = planning.training, planning.planner(chosen), planning.again()
        start = partial(compensated, run, facts) if wanted.compensate else None
        done = prune_in_steps(run, folder, planner, sparsity, wanted, training, request, facts, again, last, start)
        return {**summary(run, folder, Plan.load(folder / "plan.safetensors")), **done, "reused": False}
    plan = planning.repaired_plan(chosen, sparsity).saying(request=request)
    if dry_run:
        write_plan(plan, folder / "plan.safetensors")
        return {**summary(run, folder, plan), **facts, "dry_run": True, "later": wanted.as_options(), "reused": False}
    return _write(run, plan, folder, facts, last)


def _by_tokens(run: Run, wanted: Prune, planning: Planning, folder: Path, overwrite: bool) -> dict[str, Any]:
    """The model that ``tokens`` come to, divided as short tries find best."""
    asked = {**planning.request, "tokens": wanted.tokens, "train": run.splits["train"].digest()}
    known = None if overwrite else earlier(folder, asked)
    if known is not None and (known["way"] not in BOTH or known.get("layerwise", {}).get("better")):
        return _divided(run, wanted, known, overwrite)
    request = learnt_request(run, wanted, asked, TOGETHER if known is None else known["way"])
    if reusable(folder, made_from(folder, False), request, overwrite):
        return {**summary(run, folder, Plan.load(folder / "plan.safetensors")), "reused": True}
    refuse_foreign(folder)
    sparsity = asked_sparsity(wanted.structure, wanted.sparsity)
    given, layers = planning.plan(planning.chosen(sparsity), sparsity), ByLayers(run, wanted)
    return _divided(run, wanted, {"asked": asked, **divide(run, wanted, given, layers)}, overwrite, given, layers)


def _divided(
    run: Run,
    wanted: Prune,
    division: Mapping[str, Any],
    overwrite: bool,
    given: Plan | None = None,
    layers: ByLayers | None = None,
) -> dict[str, Any]:
    """The model that ``division`` of the tokens comes to, or ADMM's where that is better."""
    assert wanted.tokens is not None
    by_layers, layers = layerwise_of(run, wanted), layers or ByLayers(run, wanted)
    told = {"division": dict(division)}
    if division.get("layerwise", {}).get("better"):
        return prune_by_layers(run, LAYERWISE, by_layers, False, overwrite, told)
    comparable = fits_layers(wanted) and looks_again(run, wanted.tokens)
    compared = beside_layers(run, layers, division) if comparable and "layerwise" not in division else None
    if compared is None and division["way"] not in (LAYERS, LAYERS_TOGETHER):
        layers.forget()
    try:
        if division["way"] == LAYERS:
            divided = by_division(run, wanted, division)
            return prune_by_layers(run, LAYERWISE, divided, False, overwrite, told, lambda: layers.found, compared)
        if division["way"] not in BOTH:
            return prune_run(run, by_division(run, wanted, division), False, overwrite, division, compared)
        assert given is not None
        learn = partial(learnt, run, wanted, given, division["way"], tokens_left(wanted, division), layers)
        request = learnt_request(run, wanted, division["asked"], division["way"])
        return write_together(run, wanted, request, learn, (lambda _: told) if compared is None else compared)
    except LayersAreBetter as found:
        return write_by_layers(run, LAYERWISE, by_layers, found.plan, found.model, {"division": found.division})


def _for_classes(run: Run, classes: Sequence[int], names: Sequence[str], overwrite: bool) -> Run:
    """The run restricted to ``classes``, with scores made from their samples: of ``names``, or of all that the run has.

    Raises:
        UsageError: the model has no such output, or a split no sample of a class.
    """
    outputs = run_model(run.model, (run.example, None), run.task)
    if outputs.dim() != 2 or max(classes) >= outputs.shape[1]:
        raise UsageError(f"class {max(classes)} does not exist; the model has {outputs.shape[-1]} outputs, numbered from 0")
    restricted = run.restricted(classes)
    restricted.batches("validation")
    score_run(restricted, names or list(run.all_scores()), overwrite)
    return restricted


def apply_plan(
    run: Run, plan_path: Path, name: str | None, overwrite: bool = False, steps: Steps | None = None, squeezing: bool = False
) -> dict[str, Any]:
    """Applies a plan file, edited or not.

    Args:
        name: of the pruned model; by default the plan's folder under ``pruned/``.
        steps: fine-tuning, rewinding; a schedule makes plans of its own.
        squeezing: also if the plan was made without.
    """
    if steps is not None and steps.schedule.name != "one-shot":
        raise UsageError(f"--apply takes a finished plan; schedule {steps.schedule.name} makes its own, leave it out")
    check_training(run, steps)
    plan = read_plan(run, plan_path)
    refuse_without_weights(plan)
    training = training_request(run, steps)
    if not training:
        plan = untrained(plan)
    facts: dict[str, Any] = {}
    start = start_of(run, plan, facts) if training else None
    if start is not None and steps is not None and (steps.rewind is not None or not steps.trains):
        raise UsageError(
            "--apply: the plan asks for compensated weights; leave --rewind out, and --recalibrate without --finetune"
        )
    if squeezing:
        if plan.smaller:
            raise UsageError(f"--squeeze is for plans of masks; {plan.structure} are cut out as they are")
        if steps is not None and steps.request():
            raise UsageError("--squeeze is for pruning at once; leave out --finetune, --rewind and --recalibrate")
        request = {**plan.provenance.get("request", {}), "squeeze": True}
        plan = plan.saying(request=request)
    inside = plan_path.resolve().parent.parent == (run.path / "pruned").resolve()
    if name is None and not inside:
        raise UsageError(f"--name is needed: {plan_path} does not lie under {run.path / 'pruned'}")
    folder = run.path / "pruned" / (name or plan_path.resolve().parent.name)
    if (folder / "prunekit.json").exists():
        manifest = Manifest.load(folder / "prunekit.json")
        found = {"plan": manifest.plan, **manifest.facts.get("request", {})}
        if reusable(folder, found, {"plan": plan.digest, **training}, overwrite):
            return {**summary(run, folder, plan), "reused": True}
    elif folder.exists() and folder != plan_path.resolve().parent and not overwrite and any(folder.iterdir()):
        same = (folder / "plan.safetensors").resolve() == plan_path.resolve()
        if not same:
            raise ArtifactError(f"{folder}: exists; use --overwrite to replace it, or another --name")
    if steps is not None and steps.request():
        check_made_for(plan, run.model)
        refuse_foreign(folder)
        asked = plan.provenance["sparsity"]
        done = prune_in_steps(run, folder, GivenPlan(run.evidence, plan), asked, steps, training, found=facts, start=start)
        return {**summary(run, folder, plan), **done, "reused": False}
    return _write(run, plan, folder)


def _write(
    run: Run,
    plan: Plan,
    folder: Path,
    found: Mapping[str, Any] | None = None,
    last: Callable[[nn.Module], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    refuse_foreign(folder)
    example = run.example if plan.smaller else None
    request = plan.provenance.get("request", {})
    small, note = pruned_as_asked(run, plan, example)
    squeezed = None
    if request.get("squeeze"):
        samples = run.batches("validation") if run.recipe.data is not None else None
        squeezed = squeeze(small, plan, run.example, samples, run.recipe.structure.mappings())
        small = squeezed.model
    facts: dict[str, Any] = {**(found or {}), **note}
    if last is not None:
        facts |= last(small)
    told = write_pruned(run, small, plan, folder, facts, validation_of(run), squeezed)
    return {**summary(run, folder, plan), **told, "reused": False}
