"""A pruned model's folder inside a run: which run it is of, and opening it with the plan and the steps that belong to it."""

from __future__ import annotations

from pathlib import Path

import torch

from prunekit import trust
from prunekit.apply import Manifest, dense_state, load
from prunekit.criteria import model_digest
from prunekit.errors import ArtifactError, UsageError
from prunekit.plan import Plan
from prunekit.trajectory import Continued, Trajectory
from prunekit.verbs.run_folder import Run


def run_of(folder: Path) -> Path:
    """The run folder that ``RUN/pruned/<name>`` lies in.

    Raises:
        UsageError: it does not lie in one.
    """
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name != "pruned" or not (run / "recipe.yaml").exists():
        raise UsageError(f"{folder}: not RUN/pruned/NAME inside a run folder")
    return run


def open_pruned(run: Run, folder: Path) -> tuple[Manifest, Plan, torch.nn.Module]:
    """A pruned model of the run with its manifest and plan, which belong together and to this run's dense model.

    Raises:
        ArtifactError: something is missing or damaged, or does not belong; says what to do.
    """
    manifest, plan = Manifest.load(folder / "prunekit.json"), Plan.load(folder / "plan.safetensors")
    trust.check_file(run.path, folder / "plan.safetensors", {"structure": plan.structure, **plan.provenance})
    if manifest.plan != plan.digest:
        raise ArtifactError(
            f"{folder}: plan.safetensors is {plan.digest}, the model was pruned by {manifest.plan}; apply it first "
            f"(prunekit prune {run.path} --apply {folder / 'plan.safetensors'} --overwrite)"
        )
    found = model_digest(run.model)
    if plan.provenance["model"] != found:
        raise ArtifactError(
            f"{folder}: pruned from model {plan.provenance['model']}, this run's is {found}; prune again with --overwrite"
        )
    return manifest, plan, load(folder, run.new_model)


def child_of(run: Run, folder: Path, plan: Plan, pruned: torch.nn.Module) -> Trajectory:
    """The recorded fine-tuning of a pruned model.

    Raises:
        ArtifactError: it is missing or cut off, it continues another trajectory, or it ends at other weights.
    """
    child = Trajectory(folder / "trajectory")
    path = Continued(run.trajectory, child)
    if not child.complete:
        raise ArtifactError(f"{child.folder}: recording was cut off after {len(child)} steps; prune again with --overwrite")
    end = child.layout.flatten(dense_state(pruned, plan))
    if not torch.equal(path.state(-1), end.to(path.state(-1).dtype)):
        raise ArtifactError(f"{child.folder}: does not end at the weights in {folder / 'model.safetensors'}; prune again")
    return child
