"""eval: a pruned model measured on test data and explained by the kernel."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from prunekit import checkpoint
from prunekit.apply import Manifest, dense_state, load
from prunekit.batch import to
from prunekit.criteria import model_digest
from prunekit.errors import ArtifactError, UsageError
from prunekit.explain import account, dense_reconstruction, flat_mask
from prunekit.kernel import ModelFunction
from prunekit.measure import latencies, machine, sizes
from prunekit.plan import Plan
from prunekit.task.evaluation import CLASSIFICATION, Evaluation, References, measures_told
from prunekit.task.evaluation import evaluate as measured
from prunekit.trajectory import Continued, Trajectory
from prunekit.verbs.budgets import file_size
from prunekit.verbs.compensating import pruned_as_asked
from prunekit.verbs.run_folder import Run, recorded_inputs, reusable

SCHEMA = 1


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


def evaluate(run: Run, folder: Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes eval.json into ``folder`` and returns its content.

    Raises:
        ArtifactError: the pruned model is damaged or was made from another model than this run's.
    """
    if not (folder / "prunekit.json").exists():
        known = sorted(p.parent.name for p in (run.path / "pruned").glob("*/prunekit.json"))
        raise ArtifactError(f"{folder / 'prunekit.json'}: no such file; pruned models of this run: {', '.join(known) or 'none'}")
    manifest, plan, pruned = open_pruned(run, folder)
    if plan.masking:
        checkpoint.read_tensors(folder / "masks.safetensors")  # a folder is measured whole or not at all
    options = run.recipe.eval
    child = child_of(run, folder, plan, pruned) if manifest.facts.get("finetune") else None
    made_from = {
        "weights": model_digest(pruned),
        "plan": plan.digest,
        "trajectory": run.trajectory.hash,
        "test": run.splits["test"].digest(),
        "options": options.model_dump(mode="json"),
        "criterion": plan.provenance["criterion"],
        "allocation": plan.provenance["allocation"],
        "structure": plan.structure,
        "asked": plan.provenance["sparsity"],
        "child": None if child is None else child.hash,
    }
    path = folder / "eval.json"
    squeezed = bool(manifest.facts.get("squeezed"))
    if reusable(path, recorded_inputs(path, lambda p: read_evaluation(p)["made_from"]), made_from, overwrite):
        found = read_evaluation(path)
        if "masked" in found or not squeezed:  # older files do not say what a squeezed model was before: measured anew
            return {**found, "reused": True}
    started = time.perf_counter()
    unsqueezed = _unsqueezed(run, plan) if squeezed else None
    dense = run.model.to(run.device)
    pruned.to(run.device)
    task, samples = run.task, run.batches("test")
    references = References(dense, samples, task)
    dense_found = measured(dense, samples, task, None if task.measures else references)
    pruned_found = measured(pruned, samples, task, references)
    one = to(run.splits["test"].batch([0])[0], run.device)
    dense_file = safetensors.torch.save(checkpoint.unique_state({k: v.cpu() for k, v in dense.state_dict().items()})[0])
    result = {
        "schema": SCHEMA,
        "kind": "evaluation",
        "made_from": made_from,
        "test_samples": dense_found.samples,
        "measures": measures_told(task),
        "sparsity": plan.sparsity(),
        "dense": {**dense_found.figures(), **sizes(dense, one), "bytes": len(dense_file)},
        "pruned": {
            **pruned_found.figures(),
            **sizes(pruned, one),
            "bytes": (folder / "model.safetensors").stat().st_size,
        },
        **_on_classes(run, plan, dense_found, pruned_found),
        "layers": plan.counts(),
        "latency": _latency(run, dense, pruned, unsqueezed),
        "refine": _refinement(plan),
        "kernel": _kernel(run, plan, pruned, child, manifest.kept),
    }
    if unsqueezed is not None:
        result["masked"] = {
            **measured(unsqueezed, samples, task, references).figures(),
            **sizes(unsqueezed, one),
            "bytes": file_size(unsqueezed, plan),
        }
    result["cost"] = {"seconds": round(time.perf_counter() - started, 3)}
    run.model.cpu()
    checkpoint.write_json(path, result)
    return {**result, "reused": False}


def _on_classes(run: Run, plan: Plan, dense: Evaluation, pruned: Evaluation) -> dict[str, Any]:
    """Figures of a model that was pruned for some classes, on their test samples and on the others."""
    classes = plan.provenance.get("request", {}).get("classes")
    if not classes:
        return {}
    found_classes = [run.task.classes(labels) for _, labels in run.batches("test")]
    labels = torch.cat([found for found in found_classes if found is not None])
    mine = torch.isin(labels, torch.tensor(classes))
    found: dict[str, Any] = {"classes": classes, "samples": int(mine.sum())}
    for name, who in (("on_classes", mine), ("on_others", ~mine)):
        if who.any():
            found[name] = {"dense": dense.where(who).figures()[run.task.deciding.name], **pruned.where(who).figures()}
    return {"asked_classes": found}


def _unsqueezed(run: Run, plan: Plan) -> torch.nn.Module:
    """The masked model that a squeezed one was made of, made again."""
    return pruned_as_asked(run, plan)[0].to(run.device)


def _latency(run: Run, dense: torch.nn.Module, pruned: torch.nn.Module, unsqueezed: torch.nn.Module | None) -> dict[str, Any]:
    batches = {}
    test = run.splits["test"]
    for size in run.recipe.eval.latency_batches:
        x = to(test.batch([i % len(test) for i in range(size)])[0], run.device)
        medians = latencies({"dense": dense, "pruned": pruned, **({"masked": unsqueezed} if unsqueezed is not None else {})}, x)
        batches[str(size)] = {
            **{f"{name}_ms": median for name, median in medians.items()},
            "ratio": medians["pruned"] / medians["dense"],
        }
    return {"machine": machine(), "batches": batches}


def _refinement(plan: Plan) -> dict[str, Any] | None:
    """Divergence by round, of the masks that were taken, and of later refinements; None for a plan that was not refined."""
    facts = plan.provenance.get("refine")
    if facts is None:
        return None
    keys = ("stage", "round", "learn", "accept", "swapped")
    rounds = [{key: entry[key] for key in keys} for entry in facts["history"] if entry["kept"]]
    told = ("target", "samples", "before", "after", "changed", "ended")
    again = [{key: later[key] for key in told} for later in plan.provenance.get("refine_again", ())]
    return {**{key: facts[key] for key in told}, "rounds": rounds, **({"again": again} if again else {})}


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


def _kernel(
    run: Run, plan: Plan, pruned: torch.nn.Module, child: Trajectory | None, kept: Mapping[str, Sequence[int]]
) -> dict[str, Any] | None:
    """The kernel section; None for a run with a single checkpoint, which has no path."""
    trajectory, options = run.trajectory, run.recipe.eval
    if len(trajectory) == 0:
        return None
    some = run.batches("test", options.samples)
    x, y = some.rows(0, len(some))
    layout, task = trajectory.layout, run.task
    target = "outputs" if "outputs" in task.targets() else task.target
    function = ModelFunction(run.model, layout, trajectory.fixed, target, run.device, task=task)
    dense = dense_reconstruction(
        function, trajectory, x, y, run.path / "reconstruction.safetensors",
        rule=options.rule, nodes=options.nodes, tolerance=options.tolerance, stride=options.stride,
    )  # fmt: skip
    mask = flat_mask(plan, layout)
    state = layout.flatten({k: v.cpu() for k, v in dense_state(pruned.cpu(), plan, kept or None).items()})
    return account(
        function, trajectory, dense, state, mask, x, y, tolerance=options.tolerance, stride=options.stride, child=child,
        rule=options.rule, nodes=options.nodes,
    )  # fmt: skip


def read_evaluation(path: Path) -> dict[str, Any]:
    """Raises ArtifactError when eval.json is missing, damaged, or lacks what tables and pages show of it."""
    found = checkpoint.read_json(path, "evaluation")
    with checkpoint.reading(path, "evaluation"):
        small = ["pruned", *(["masked"] if "masked" in found else [])]
        found.setdefault("measures", CLASSIFICATION)  # files that are older than this key
        for part in ("dense", *small):
            _ = [float(found[part][key]) for key in ("parameters", "nonzero", "macs", "bytes")]
            _ = [float(found[part][m["name"]]) for m in found["measures"] if part != "dense" or not m["close"]]
        _ = found["test_samples"], [(m["better"], m["unit"]) for m in found["measures"]]
        _ = float(found["sparsity"]["prunable"]), float(found["sparsity"]["all"]), found["latency"]["machine"]
        _ = [found["made_from"][key] for key in ("criterion", "allocation", "structure", "weights")]
        _ = [float(t[f"{part}_ms"]) for t in found["latency"]["batches"].values() for part in ("dense", *small)]
        _ = [(c["kept"] / c["total"]) for c in found["layers"].values()]
        if found["kernel"] is not None:
            for part in ("dense", "pruned", "masked_machine"):
                _ = [float(found["kernel"][part][key]) for key in ("mean_error", "max_error", "mean_output")]
                _ = found["kernel"][part]["argmax_agreement"]  # null where outputs are no classes
            _ = [float(v["share"]) for v in found["kernel"]["pruned"]["by_layer"].values()]
            _ = (
                [found["kernel"]["dense"]["certificate"][key] for key in ("total", "worst_step", "worst")],
                found["kernel"]["samples"],
            )
    return found
