"""prune: scores to a plan, and a plan to a smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit import checkpoint
from prunekit.apply import Manifest, prune, save, squeeze
from prunekit.criteria import Scores, get_criterion
from prunekit.errors import ArtifactError, UsageError
from prunekit.measure import accuracy, predict
from prunekit.plan import ALLOCATIONS, Plan, check_sparsity, check_structure, make_plan
from prunekit.plan.allocation import get_allocation
from prunekit.recipe import Refine
from prunekit.search import Candidates, Comparison, choose, refine
from prunekit.verbs.run_folder import PROBLEM, Run, reusable
from prunekit.verbs.scoring import comparison_inputs


def prune_run(
    run: Run,
    name: str,
    criterion: str,
    sparsity: float,
    structure: str = "unstructured",
    allocation: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    refining: Refine | None = None,
    squeezing: bool = False,
) -> dict[str, Any]:
    """Plans and prunes; with ``dry_run`` only the plan is written, to be looked at and edited.

    Args:
        criterion: a name, or ``auto``: the criterion and allocation that do best on validation data there.
        allocation: None leaves the choice to ``auto``, else means ``global``.
        refining: repair the plan on scoring samples.
        squeezing: take out channels that an unstructured plan left without effect.

    Raises:
        UsageError: a name or value that does not exist.
        ArtifactError: ``pruned/<name>`` holds something else.
        StructureError: the model cannot take the structure.
    """
    check_sparsity(sparsity)
    check_structure(structure)
    if allocation is not None:
        get_allocation(allocation)
    if criterion != "auto":
        get_criterion(criterion)
    if squeezing and structure == "channels":
        raise UsageError("--squeeze is for unstructured plans; channels are cut out as they are")
    scores = run.all_scores() if criterion == "auto" else {criterion: run.scores(criterion)}
    request: dict[str, Any] = {
        "criterion": criterion,
        "sparsity": sparsity,
        "structure": structure,
        "allocation": allocation,
        "scores": {n: s.digest for n, s in scores.items()},
    }
    if refining is not None:
        request["refine"] = {**refining.model_dump(mode="json"), "data": run.splits["scoring"].digest()}
    if squeezing:
        request["squeeze"] = True
    folder = run.path / "pruned" / name
    if reusable(folder, _made_from(folder, dry_run), request, overwrite):
        return {**_summary(folder, Plan.load(folder / "plan.safetensors")), "reused": True}
    chosen: Mapping[str, Any] = {"criterion": criterion, "allocation": allocation or "global"}
    if criterion == "auto":
        chosen = _auto(run, scores, structure, sparsity, allocation)
    plan = make_plan(
        scores[chosen["criterion"]],
        run.model,
        run.example if structure == "channels" else None,
        sparsity=sparsity,
        structure=structure,
        allocation=chosen["allocation"],
    )
    if refining is not None:
        plan = _refined(run, plan, refining)
        if plan.provenance["refine"]["ended"] == "interrupted":
            request["refine"]["ended"] = "interrupted"  # so that it is not taken for what was asked
    plan.provenance["request"] = request
    if dry_run:
        plan.save(folder / "plan.safetensors")
        return {**_summary(folder, plan), "dry_run": True, "reused": False}
    return _write(run, plan, folder)


def _refined(run: Run, plan: Plan, options: Refine) -> Plan:
    loss = run.recipe.load_loss()
    try:
        batches = run.batches("scoring", options.samples)
        return refine(plan, run.model.to(run.device), batches, seed=run.recipe.seed, loss=loss, **options.options())
    finally:
        run.model.cpu()


def apply_plan(run: Run, plan_path: Path, name: str | None, overwrite: bool = False, squeezing: bool = False) -> dict[str, Any]:
    """Applies a plan file, edited or not.

    Args:
        name: of the pruned model; by default the plan's folder under ``pruned/``.
        squeezing: also if the plan was made without.
    """
    plan = Plan.load(plan_path)
    if squeezing:
        if plan.structure != "unstructured":
            raise UsageError("--squeeze is for unstructured plans; channels are cut out as they are")
        plan.provenance.setdefault("request", {})["squeeze"] = True
    inside = plan_path.resolve().parent.parent == (run.path / "pruned").resolve()
    if name is None and not inside:
        raise UsageError(f"--name is needed: {plan_path} does not lie under {run.path / 'pruned'}")
    folder = run.path / "pruned" / (name or plan_path.resolve().parent.name)
    if (folder / "prunekit.json").exists():
        found = {"plan": Manifest.load(folder / "prunekit.json").plan}
        if reusable(folder, found, {"plan": plan.digest}, overwrite):
            return {**_summary(folder, plan), "reused": True}
    elif folder.exists() and folder != plan_path.resolve().parent and not overwrite and any(folder.iterdir()):
        same = (folder / "plan.safetensors").resolve() == plan_path.resolve()
        if not same:
            raise ArtifactError(f"{folder}: exists; use --overwrite to replace it, or another --name")
    return _write(run, plan, folder)


OURS = {"model.safetensors", "masks.safetensors", "plan.safetensors", "prunekit.json", "eval.json", "trajectory"}


def _write(run: Run, plan: Plan, folder: Path) -> dict[str, Any]:
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in OURS) if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(
            f"{folder}: holds {', '.join(foreign) or 'no folder'}, which would be lost; move it, or take another --name"
        )
    example = run.example if plan.structure == "channels" else None
    small = prune(run.model, plan, example)
    squeezed = None
    if plan.provenance.get("request", {}).get("squeeze"):
        squeezed = squeeze(small, plan, run.example, run.batches("validation") if run.recipe.data is not None else None)
        small = squeezed.model
    facts: dict[str, Any] = {}
    if run.recipe.data is not None:
        facts["validation_accuracy"] = accuracy(*predict(small, run.batches("validation")))
    save(small, plan, folder, facts, squeezed)
    return {**_summary(folder, plan), **facts, "reused": False}


def _auto(run: Run, scores: Mapping[str, Scores], structure: str, sparsity: float, allocation: str | None) -> dict[str, Any]:
    inputs = comparison_inputs(run)
    comparison = None
    if inputs and inputs.get("scores") == {n: s.digest for n, s in scores.items()}:
        comparison = Comparison.load(run.path / "compare.json")
    candidates = Candidates(run.model, scores, run.batches("validation"), [structure])
    return choose(candidates, comparison, structure, sparsity, [allocation] if allocation else list(ALLOCATIONS))


def _made_from(folder: Path, dry_run: bool) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    try:
        if dry_run and not (folder / "prunekit.json").exists():
            found: dict[str, Any] = Plan.load(folder / "plan.safetensors").provenance
        else:
            manifest = Manifest.load(folder / "prunekit.json")
            found = manifest.provenance
            files = ["plan", "model", *(["masks"] if manifest.structure == "unstructured" else [])]
            for name in files:  # a damaged one may not be reused
                checkpoint.read_tensors(folder / f"{name}.safetensors")
    except ArtifactError as error:
        if (folder / "plan.safetensors").exists() and not (folder / "prunekit.json").exists():
            return {PROBLEM: f"it holds a plan that was not applied yet (--apply {folder / 'plan.safetensors'})"}
        return {PROBLEM: str(error)}
    return {PROBLEM: "its plan was edited by hand"} if found.get("edited") else dict(found.get("request", {}))


def _summary(folder: Path, plan: Plan) -> dict[str, Any]:
    reached = plan.sparsity()
    refined = plan.provenance.get("refine")
    manifest = folder / "prunekit.json"
    return {
        "name": folder.name,
        "path": str(folder),
        "structure": plan.structure,
        "criterion": plan.provenance["criterion"],
        "allocation": plan.provenance["allocation"],
        "asked": plan.provenance["sparsity"],
        "achieved": reached["prunable"],
        "achieved_all": reached["all"],
        "by_auto": plan.provenance.get("request", {}).get("criterion") == "auto",
        "edited": bool(plan.provenance.get("edited")),
        "refine": {k: v for k, v in refined.items() if k not in ("history", "options")} if refined else None,
        "squeezed": Manifest.load(manifest).facts.get("squeezed") if manifest.exists() else None,
        "layers": plan.counts(),
        "groups": {n: {"total": len(k), "kept": int(k.sum())} for n, k in plan.keep.items()} if plan.index else {},
    }
