"""A pruned model's folder inside a run: written, and opened with the plan and the steps that belong to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunekit import ranks, trust
from prunekit.apply import Manifest, Squeezed, dense_state, load, save
from prunekit.apply.answers import check_answers
from prunekit.criteria import model_digest
from prunekit.errors import ArtifactError, UsageError
from prunekit.plan import Plan
from prunekit.trajectory import Continued, Trajectory
from prunekit.trajectory.bare import named_tensors
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import Validation


def run_of(folder: Path) -> Path:
    """The run folder that ``RUN/pruned/<name>`` lies in, as it is written, or that a link to such a folder leads into.

    Raises:
        UsageError: it does not lie in one.
    """
    for place in (Path(os.path.abspath(folder)), folder.resolve()):
        run = place.parent.parent
        if place.parent.name == "pruned" and (run / "recipe.yaml").exists():
            return run
    raise UsageError(f"{folder}: not RUN/pruned/NAME inside a run folder")


def read_plan(run: Run, path: Path) -> Plan:
    """A plan file, whoever made it.

    Raises:
        ArtifactError: it is missing or damaged.
        UsageError: it names code, see ``prunekit.trust``.
    """
    plan = Plan.load(path)
    trust.check_file(run.said, path, _named(plan))
    return plan


def write_plan(plan: Plan, path: Path) -> None:
    """A plan alone, to be looked at and edited."""
    _agreed(plan)
    plan.save(path)
    trust.used(_named(plan))


def write_pruned(
    run: Run,
    small: torch.nn.Module,
    plan: Plan,
    folder: Path,
    facts: Mapping[str, Any],
    validation: Validation | None,
    squeezed: Squeezed | None = None,
) -> dict[str, Any]:
    """A pruned model, once it was seen to answer; the facts of its manifest, those of ``validation`` among them.

    Raises:
        NonFiniteError: it answers NaN where the dense model does not.
    """
    _agreed(plan)
    told = dict(facts)
    if validation is not None:
        lost = validation.lost(small)
        told |= {f"validation_{validation.figure.name}": lost["pruned"], "validation": lost}
        check_answers(run.model, small, run.example)
    save(small, plan, folder, told, squeezed)
    trust.used(_named(plan))
    return told


def write_beside(
    run: Run, small: torch.nn.Module, plan: Plan, folder: Path, facts: Mapping[str, Any], validation: Validation | None
) -> dict[str, Any]:
    """``write_pruned`` into a folder that is being made and holds something already, such as a recording."""
    inner = folder / "model"
    told = write_pruned(run, small, plan, inner, facts, validation)
    for path in inner.iterdir():
        os.replace(path, folder / path.name)
    inner.rmdir()
    return told


def _agreed(plan: Plan) -> None:
    """Raises PrunekitError where another rank has come to another plan."""
    ranks.alike("the plan", torch.cat([keep.flatten() for keep in plan.keep.values()]))


def _named(plan: Plan) -> dict[str, Any]:
    return {"structure": plan.structure, **plan.provenance}


def open_pruned(run: Run, folder: Path) -> tuple[Manifest, Plan, torch.nn.Module]:
    """A pruned model of the run with its manifest and plan, which belong together and to this run's dense model.

    Raises:
        ArtifactError: something is missing or damaged, or does not belong; says what to do.
    """
    manifest, plan = Manifest.load(folder / "prunekit.json"), read_plan(run, folder / "plan.safetensors")
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
    named = named_tensors(run.model)
    for name, shape in plan.shapes.items():
        if name not in named or named[name].shape != shape:
            own = tuple(named[name].shape) if name in named else "absent"
            raise ArtifactError(f"{folder / 'plan.safetensors'}: its model's {name} is {tuple(shape)}; here it is {own}")
    return manifest, plan, load(folder, run.new_model)


def child_of(run: Run, folder: Path, plan: Plan, pruned: torch.nn.Module) -> Trajectory:
    """The recorded fine-tuning of a pruned model.

    Raises:
        ArtifactError: it is missing or cut off, it continues another trajectory, or it ends at other weights.
    """
    if not (folder / "trajectory" / "trajectory.json").exists():
        raise ArtifactError(f"{folder / 'trajectory'}: the recording of its training is missing; prune again with --overwrite")
    child = Trajectory(folder / "trajectory")
    path = Continued(run.trajectory, child)
    if not child.complete:
        raise ArtifactError(f"{child.folder}: recording was cut off after {len(child)} steps; prune again with --overwrite")
    end = child.layout.flatten(dense_state(pruned, plan))
    if not torch.equal(path.state(-1), end.to(path.state(-1).dtype)):
        raise ArtifactError(f"{child.folder}: does not end at the weights in {folder / 'model.safetensors'}; prune again")
    return child
