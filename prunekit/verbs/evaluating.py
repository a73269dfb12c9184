"""eval: a pruned model measured on test data and explained by the kernel."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from prunekit import checkpoint, ranks
from prunekit.apply import dense_state
from prunekit.apply.manifest import MASKS
from prunekit.batch import device_of, to
from prunekit.criteria import model_digest
from prunekit.errors import ArtifactError, UsageError
from prunekit.explain import EvaluationRecord, account, dense_reconstruction, flat_mask
from prunekit.explain.account import Account
from prunekit.explain.evaluation import Budget, Latency, LostOn, OnClasses, Refined, Refinement, Round
from prunekit.kernel import ModelFunction
from prunekit.measure import conditions, machine, sizes, timed, zipped
from prunekit.measure.bound import is_due, reason
from prunekit.plan import Plan
from prunekit.reusing import recorded_inputs, reusable
from prunekit.task.evaluation import Evaluation, References, compared, measures_told
from prunekit.task.evaluation import evaluate as measured
from prunekit.task.protocol import surprise
from prunekit.trajectory import Trajectory
from prunekit.verbs.accounts import keep_removal, keep_timeline
from prunekit.verbs.budgets import file_size
from prunekit.verbs.compensating import pruned_as_asked
from prunekit.verbs.language import language_figures
from prunekit.verbs.placement import DeviceMap, placed_on
from prunekit.verbs.pruned_folder import child_of, open_pruned
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import validation_in

CHORDS = 32
"""Pieces, at most, that fine-tuning is rebuilt in where the dense model's training is not known: each is straight and leads
over as many steps as it takes. All steps one by one would take longer than they took to train."""


def evaluate(
    run: Run, folder: Path, overwrite: bool = False, device_map: DeviceMap | None = None
) -> tuple[EvaluationRecord, bool]:
    """Writes eval.json into ``folder``, and beside it and into the run folder what the report explains (``verbs.accounts``).

    Args:
        device_map: spreads both models' weights over devices, main memory and disk while they are measured.

    Returns:
        what it holds, and whether it was there already.

    Raises:
        ArtifactError: the pruned model is damaged or was made from another model than this run's.
        UsageError: with a device map, the run has a path, along which all weights are needed on one device.
    """
    if device_map is not None and len(run.trajectory):  # of a single checkpoint that was trained on the account is left out
        raise UsageError(
            "--device-map: this run has a training path, and eval rebuilds the model along it with all weights on one device; "
            "leave --device-map out"
        )
    found = _evaluate(run, folder, overwrite, device_map)
    keep_timeline(run)
    keep_removal(run, folder.resolve().name)
    return found


def _evaluate(run: Run, folder: Path, overwrite: bool, device_map: DeviceMap | None) -> tuple[EvaluationRecord, bool]:
    if not (folder / "prunekit.json").exists():
        known = sorted(p.parent.name for p in (run.path / "pruned").glob("[!.]*/prunekit.json"))
        raise ArtifactError(f"{folder / 'prunekit.json'}: no such file; pruned models of this run: {', '.join(known) or 'none'}")
    manifest, plan, pruned = open_pruned(run, folder)
    if plan.masking:
        manifest.tensors(folder, MASKS)  # a folder is measured whole or not at all
    options = run.recipe.eval
    child = child_of(run, folder, plan, pruned) if manifest.facts.get("finetune") else None
    made_from = {
        "weights": model_digest(pruned),
        "plan": plan.digest,
        "trajectory": run.trajectory.hash,
        "test": run.splits["test"].digest(),
        "options": {**options.model_dump(mode="json"), "samples": run.explained},
        "criterion": plan.provenance["criterion"],
        "allocation": plan.provenance["allocation"],
        "structure": plan.structure,
        "asked": plan.provenance["sparsity"],
        "child": None if child is None else child.hash,
    }
    path = folder / "eval.json"
    squeezed = bool(manifest.facts.get("squeezed"))
    if reusable(path, recorded_inputs(path, lambda p: EvaluationRecord.load(p).made_from), made_from, overwrite):
        found = EvaluationRecord.load(path)
        told = found.language is not None or surprise(run.task) is None
        told = told and (found.kernel is not None or device_map is not None or not _has_account(run, plan, child))
        if told and (found.masked is not None or not squeezed):  # what older files do not say is measured anew
            return found, True
    started = time.perf_counter()
    unsqueezed = _unsqueezed(run, plan) if squeezed else None
    dense, task, samples = run.model.cpu(), run.task, run.batches("test")
    one = run.splits["test"].batch([0])[0]
    dense_file = safetensors.torch.save(checkpoint.unique_state(dense.state_dict())[0])
    models = {"dense": dense, "pruned": pruned, **({"masked": unsqueezed} if unsqueezed is not None else {})}
    all_sizes = {name: sizes(model, one) for name, model in models.items()}
    dense_sizes, pruned_sizes = all_sizes["dense"], all_sizes["pruned"]
    with placed_on(list(models.values()), run.device, device_map):
        references = References(dense, samples, task)
        dense_found = measured(dense, samples, task, None if task.measures else references)
        pruned_found = measured(pruned, samples, task, references)
        before = None if unsqueezed is None else measured(unsqueezed, samples, task, references).figures()
        language = language_figures(run, {"dense": dense, "pruned": pruned}, dense_found, pruned_found)
        work = (dense_sizes["macs"], pruned_sizes["macs"])
        latency = ranks.from_first(lambda: _latency(run, models, work, device_map is not None))
    if unsqueezed is not None and before is not None:
        before |= {**all_sizes["masked"], "bytes": file_size(unsqueezed, plan)}
    reached = plan.sparsity()
    record = EvaluationRecord(
        made_from=made_from,
        test_samples=dense_found.samples,
        measures=measures_told(task),
        sparsity={"prunable": reached["prunable"], "all": reached["all"]},
        dense={**dense_found.figures(), **dense_sizes, **_bytes(io.BytesIO(dense_file), len(dense_file))},
        pruned={**pruned_found.figures(), **pruned_sizes, **_file_bytes(folder / "model.safetensors")},
        asked_classes=_on_classes(run, plan, dense_found, pruned_found),
        layers={name: {"total": c["total"], "kept": c["kept"]} for name, c in plan.counts().items()},
        latency=latency,
        refine=_refinement(plan),
        kernel=None if device_map is not None else _kernel(run, plan, pruned, child, manifest.kept),
        masked=before,
        lost=_lost(run, plan, manifest.facts, dense_found, pruned_found),
        budget=_budget(manifest.facts),
        language=language,
        cost={"seconds": round(time.perf_counter() - started, 3)},
    )
    record.save(path)
    return record, False


def _file_bytes(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        return _bytes(file, path.stat().st_size)


def _bytes(file: BinaryIO, size: int) -> dict[str, int]:
    return {"bytes": size, "zipped": zipped(file, size)}


def _lost(run: Run, plan: Plan, facts: Mapping[str, Any], dense: Evaluation, pruned: Evaluation) -> LostOn:
    """Of a model that was pruned for some classes, on their samples, where there are any."""
    mine = _samples_of_classes(run, plan)
    if mine is not None and mine.any():
        dense, pruned = dense.where(mine), pruned.where(mine)
    found: LostOn = {"test": compared(pruned, dense)}
    if (validation := validation_in(facts, run.task.deciding.name)) is not None:
        found["validation"] = validation
    return found


def _budget(facts: Mapping[str, Any]) -> Budget | None:
    """The budget that a manifest tells of."""
    if "budget" not in facts:
        return None
    ((name, asked),) = facts["budget"].items()
    return {"name": name, "asked": asked, "reached": facts["reached"]}


def _samples_of_classes(run: Run, plan: Plan) -> Tensor | None:
    """Which test samples are of the classes that a model was pruned for; None for a model of all classes."""
    classes = plan.provenance.get("request", {}).get("classes")
    if not classes:
        return None
    found = [run.task.classes(labels) for _, labels in run.batches("test")]
    return torch.isin(torch.cat([labels for labels in found if labels is not None]), torch.tensor(classes))


def _on_classes(run: Run, plan: Plan, dense: Evaluation, pruned: Evaluation) -> OnClasses | None:
    """Figures of a model that was pruned for some classes, on their test samples and on the others."""
    mine = _samples_of_classes(run, plan)
    if mine is None:
        return None
    found: OnClasses = {"classes": plan.provenance["request"]["classes"], "samples": int(mine.sum())}
    if mine.any():
        found["on_classes"] = _figures(run, dense, pruned, mine)
    if not mine.all():
        found["on_others"] = _figures(run, dense, pruned, ~mine)
    return found


def _figures(run: Run, dense: Evaluation, pruned: Evaluation, who: Tensor) -> dict[str, float]:
    """The pruned model's figures on some samples, and the dense one's first."""
    return {"dense": dense.where(who).figures()[run.task.deciding.name], **pruned.where(who).figures()}


def _unsqueezed(run: Run, plan: Plan) -> torch.nn.Module:
    """The masked model that a squeezed one was made of, made again."""
    return pruned_as_asked(run, plan)[0].cpu()


def _latency(run: Run, models: Mapping[str, torch.nn.Module], macs: tuple[int, int], spread: bool) -> Latency:
    """Args: ``spread``, whether weights come from several places, whose way is timed with them."""
    batches, why = {}, {}
    test = run.splits["test"]
    for size in run.recipe.eval.latency_batches:
        x = to(test.batch([i % len(test) for i in range(size)])[0], device_of(models["dense"]))
        timing = timed(models, x)
        medians = {name: timing.ms(name).median for name in models}
        found = timing.speed("pruned", size)
        batches[str(size)] = {
            **{f"{name}_ms": median for name, median in medians.items()},
            "ratio": medians["pruned"] / medians["dense"],
            **{key: float(found[key]) for key in ("speedup", "low", "high", "rounds")},
        }
        if not spread and is_due(macs, (medians["dense"], medians["pruned"])):
            why[str(size)] = reason(models["pruned"], x, macs[1], medians["pruned"])
    where = f"{machine(run.device)}, weights placed by accelerate" if spread else machine(run.device)
    told: Latency = {"machine": where, "batches": batches, "conditions": conditions()}
    return told | {"why": why} if why else told


def _refinement(plan: Plan) -> Refinement | None:
    """Divergence by round, of the masks that were taken, and of later refinements; None for a plan that was not refined."""
    facts = plan.provenance.get("refine")
    if facts is None:
        return None
    rounds: list[Round] = [
        {
            "stage": entry["stage"],
            "round": entry["round"],
            "learn": entry["learn"],
            "accept": entry["accept"],
            "swapped": entry["swapped"],
        }
        for entry in facts["history"]
        if entry["kept"]
    ]
    found: Refinement = {**_refined(facts), "rounds": rounds}
    if again := plan.provenance.get("refine_again", ()):
        found["again"] = [_refined(later) for later in again]
    return found


def _refined(facts: Mapping[str, Any]) -> Refined:
    return {
        "target": facts["target"],
        "samples": facts["samples"],
        "before": facts["before"],
        "after": facts["after"],
        "changed": facts["changed"],
        "ended": facts["ended"],
    }


def _has_account(run: Run, plan: Plan, child: Trajectory | None) -> bool:
    return bool((len(run.trajectory) or child is not None) and run.explained and not plan.stand_ins())


def _kernel(
    run: Run, plan: Plan, pruned: torch.nn.Module, child: Trajectory | None, kept: Mapping[str, Sequence[int]]
) -> Account | None:
    """The kernel section; None where nothing was trained, here or before, where zeros do not say what went, or of no samples."""
    trajectory, options = run.trajectory, run.recipe.eval
    if not _has_account(run, plan, child):
        return None
    some = run.batches("test", run.explained)
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
    few = 1 if child is None or len(trajectory) else -(-child.pieces // CHORDS)
    return account(
        function, trajectory, dense, state, mask, x, y, tolerance=options.tolerance, stride=max(options.stride, few), child=child,
        rule=options.rule, nodes=options.nodes,
    )  # fmt: skip
