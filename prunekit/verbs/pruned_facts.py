"""What a pruned model's folder was made from, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.apply import Manifest
from prunekit.errors import ArtifactError, PrunekitError
from prunekit.plan import Plan
from prunekit.reusing import PROBLEM
from prunekit.task.evaluation import measures_told
from prunekit.trajectory import Trajectory
from prunekit.verbs.budgets import parameters_left, parameters_of
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import validation_in

BUDGET = ("budget", "measure", "reached", "standard_error", "speed")
"""What ``within_budget`` puts on record."""
OURS = {
    "model.safetensors", "masks.safetensors", "plan.safetensors", "prunekit.json", "eval.json", "removal.json", "trajectory",
}  # fmt: skip


def refuse_foreign(folder: Path) -> None:
    """Raises ArtifactError when ``folder`` holds what prunekit did not write, which would be lost."""
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in OURS) if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(
            f"{folder}: holds {', '.join(foreign) or 'no folder'}, which would be lost; move it, or take another --name"
        )


def made_from(folder: Path, dry_run: bool) -> dict[str, Any] | None:
    if not folder.exists() or not any(path.name[0] != "." for path in folder.iterdir()):  # a killed process leaves it empty
        return None
    trained: dict[str, Any] = {}
    try:
        if dry_run and not (folder / "prunekit.json").exists():
            found: dict[str, Any] = Plan.load(folder / "plan.safetensors").provenance
        else:
            manifest = Manifest.load(folder / "prunekit.json")
            found, trained = manifest.provenance, manifest.facts.get("request", {})
            manifest.prove(folder)  # a damaged one may not be reused
            if manifest.facts.get("finetune"):
                Trajectory(folder / "trajectory").verify()
    except PrunekitError as error:
        if (folder / "plan.safetensors").exists() and not (folder / "prunekit.json").exists():
            return {PROBLEM: f"it holds a plan that was not applied yet (--apply {folder / 'plan.safetensors'})"}
        return {PROBLEM: str(error)}
    if found.get("edited"):
        return {PROBLEM: "its plan was edited by hand"}
    request = found.get("request", {})
    if isinstance(request.get("refine"), dict) and request["refine"].get("ended") == "interrupted":
        return {PROBLEM: "refining was interrupted"}
    return {**request, **trained}


def summary(run: Run, folder: Path, plan: Plan) -> dict[str, Any]:
    reached = plan.sparsity()
    refined = plan.provenance.get("refine")
    facts = Manifest.load(folder / "prunekit.json").facts if (folder / "prunekit.json").exists() else {}
    asked = plan.provenance["sparsity"]
    request = plan.provenance.get("request", {})  # under a budget nobody asked for a sparsity
    return {
        "name": folder.name,
        "path": str(folder),
        "structure": plan.structure,
        "criterion": plan.provenance["criterion"],
        "allocation": plan.provenance["allocation"],
        "measures": measures_told(run.task),
        "asked": asked,
        "achieved": reached["prunable"],
        "achieved_all": reached["all"],
        "parameters": {"kept": round(parameters_left(run.model, plan)), "total": parameters_of(run.model)},
        "validation": validation_in(facts, run.task.deciding.name),
        "missed": plan.missed if request.get("sparsity", asked) is not None else None,
        "budget": None,
        **{key: facts[key] for key in BUDGET if key in facts},
        "compensated": "compensate" in plan.provenance.get("request", {}),
        "by_auto": plan.provenance.get("request", {}).get("criterion") == "auto",
        "classes": plan.provenance.get("request", {}).get("classes", []),
        "layerwise": plan.provenance.get("layerwise"),
        "edited": bool(plan.provenance.get("edited")),
        "refine": _brief(refined) if refined else None,
        "refined_again": [_brief(facts) for facts in plan.provenance.get("refine_again", ())],
        "refine_tried": plan.provenance.get("refine_tried"),
        "division": facts.get("division"),
        "finetune": facts.get("finetune"),
        "compensation_note": facts.get("compensation_note"),
        "squeezed": facts.get("squeezed"),
        "layers": plan.counts(),
        "groups": {name: {"total": len(plan.keep[name]), "kept": kept} for name, kept in plan.units_left().items()},
        "refused": dict(plan.provenance.get("refused", {})),
    }


def _brief(refined: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in refined.items() if k not in ("history", "options")}
