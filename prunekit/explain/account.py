"""The kernel's account of a pruned model: the dense model rebuilt from its path, and pruning as the path's last step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.batch import Inputs, Labels, size, to
from prunekit.data.identity import tensors
from prunekit.errors import ArtifactError
from prunekit.explain.answers import class_labels, class_outputs
from prunekit.kernel import ModelFunction, Reconstruction, masked_machine, reconstruct, shares_by_layer
from prunekit.measure import agreement, kl
from prunekit.progress import Bar
from prunekit.trajectory import Continued, Segment, Trajectory

OUTPUTS = 1000  # up to this number of outputs the record has each one's error, where outputs are no classes


class Fit(TypedDict):
    """How far outputs that were rebuilt are from the model's; ``argmax_agreement`` is None where outputs are no classes."""

    mean_error: float
    max_error: float
    mean_error_per_output: NotRequired[list[float] | None]
    max_error_per_output: NotRequired[list[float] | None]
    mean_output: float
    argmax_agreement: float | None


class Certificate(TypedDict):
    """What is left unexplained of the steps of a path, in mean absolute output."""

    total: float
    mean_per_step: NotRequired[float]
    worst_step: int
    worst: float
    evaluations_per_sample_and_step: NotRequired[float]


class PathPart(TypedDict):
    """A part of a path: how far it moved the outputs, and the certificate of its steps."""

    mean_change: float
    certificate: Certificate


class DenseFit(Fit):
    certificate: Certificate


class PathSteps(TypedDict):
    """How many steps of training, and of fine-tuning, a pruned model's path has."""

    dense: int
    finetuning: int


class LayerShare(TypedDict):
    """How far a layer's removal moved the outputs, and its share in all layers'."""

    mean_change: NotRequired[float]
    share: float


class PrunedFit(Fit):
    """``new_values``: how many weights that stay pruning gave another value (compensation, layer-wise methods, soft masks)."""

    steps: NotRequired[PathSteps]
    new_values: NotRequired[int]
    pruning_step_error: NotRequired[float]
    evaluations_per_sample: NotRequired[float]
    mean_change: NotRequired[float]
    by_layer: dict[str, LayerShare]
    by_layer_residual: NotRequired[float]
    rewound: NotRequired[PathPart]
    finetuning: NotRequired[PathPart]


class MaskedMachineFit(Fit):
    kl_to_pruned: NotRequired[float | None]


class Account(TypedDict):
    """The kernel section of an evaluation; what ``NotRequired`` keys lack there is a part of the path, or a file's age."""

    samples: int
    dense: DenseFit
    pruned: PrunedFit
    masked_machine: MaskedMachineFit


def dense_reconstruction(
    function: ModelFunction,
    trajectory: Trajectory,
    x: Inputs,
    y: Labels,
    cache: Path,
    *,
    rule: str,
    nodes: int | None,
    tolerance: float,
    stride: int,
) -> Reconstruction:
    """``reconstruct`` along the whole path, kept in ``cache`` for the next pruned model of the same run.

    Of a single checkpoint, whose path has no pieces, the model itself.
    """
    if trajectory.pieces == 0:
        with torch.no_grad():
            value = function(trajectory.state(-1).to(function.device), to(x, function.device), to(y, function.device))
        return Reconstruction(value, value, value, value.new_zeros(0), 0)
    made_from = {
        "trajectory": trajectory.hash,
        "data": checkpoint.digest(tensors((x, y))),
        "rule": rule,
        "nodes": nodes,
        "tolerance": tolerance,
        "stride": stride,
        **({"task": facts} if (facts := function.task.facts()) else {}),
    }
    try:
        header = checkpoint.read_header(cache, "reconstruction")
        if header["made_from"] == made_from:
            t = checkpoint.read_tensors(cache)
            return Reconstruction(t["start"], t["rebuilt"], t["model"], t["residuals"], header["evaluations"])
    except ArtifactError:
        pass  # absent or damaged: it is made again
    with Bar("rebuild the dense model (steps)", -(-trajectory.pieces // stride)) as bar:
        fixed: dict[str, Any] = {"tolerance": tolerance} if nodes is None else {"tolerance": None, "nodes": nodes}
        made = reconstruct(function, trajectory.segments(stride), x, y, rule=rule, tick=bar.advance, **fixed)
    checkpoint.write_tensors(
        cache,
        {"start": made.start, "rebuilt": made.rebuilt, "model": made.model, "residuals": made.residuals},
        {"kind": "reconstruction", "schema": 1, "made_from": made_from, "evaluations": made.evaluations},
    )
    return made


def account(
    function: ModelFunction,
    trajectory: Trajectory,
    dense: Reconstruction,
    pruned_state: Tensor,
    mask: Tensor,
    x: Inputs,
    y: Labels,
    *,
    tolerance: float,
    stride: int,
    child: Trajectory | None = None,
    rule: str = "midpoint",
    nodes: int | None = None,
) -> Account:
    """The kernel section of an evaluation, as JSON values. What it says by layer is about all prunings of the path.

    Where the task has no class a sample, ``argmax_agreement`` and ``kl_to_pruned`` are None, and errors by output are where there
    are more outputs than can be told.

    Args:
        function: explained is its target: ``outputs``, or the task's own where it has no outputs one by one.
        dense: the dense model's reconstruction on ``x``.
        pruned_state: the pruned model in dense coordinates, ``(P,)``.
        mask: flat ``(P,)``, True where a coordinate stays.
        tolerance: allowed error per sample of the pruning step.
        child: the steps of fine-tuning; the pruned model's path goes on along them. Where it branches off from an earlier
            state than the last (rewinding), the path leaves the dense model's there.
        rule, nodes: of a step of training, as in ``dense_reconstruction``.
    """
    path = None if child is None else Continued(trajectory, child)
    last = trajectory.state(-1)
    step = path.joint if path is not None else Segment(len(trajectory), last, pruned_state, torch.zeros_like(last))
    fixed: dict[str, Any] = {"tolerance": tolerance} if nodes is None else {"tolerance": None, "nodes": nodes}
    fixed["jumps"] = tolerance
    labelled = class_labels(function.task, dense.model, y) is not None

    def classes(values: Tensor) -> Tensor:
        return class_outputs(function.task, values)

    def fit(rebuilt: Tensor, model: Tensor) -> Fit:
        error = (rebuilt - model).abs()
        each = labelled or error.shape[1] <= OUTPUTS
        return {
            "mean_error": float(error.mean()),
            "max_error": float(error.max()),
            "mean_error_per_output": error.mean(0).tolist() if each else None,
            "max_error_per_output": error.amax(0).tolist() if each else None,
            "mean_output": float(model.abs().mean()),
            "argmax_agreement": agreement(classes(rebuilt), classes(model)) if labelled else None,
        }

    def along(segments: Iterator[Segment], pieces: int, what: str) -> Reconstruction | None:
        """None for no pieces at all."""
        first = next(segments, None)
        if first is None:
            return None
        with Bar(what, pieces) as bar:
            return reconstruct(function, chain([first], segments), x, y, rule=rule, tick=bar.advance, **fixed)

    before: Reconstruction | None = dense
    if path is not None and path.branch < len(trajectory):
        pieces = -(-trajectory.pieces_until(path.branch) // stride)
        before = along(trajectory.segments(stride, until=path.branch), pieces, "rebuild the rewound model (steps)")
    samples = size(x)
    with Bar("rebuild the pruned model (samples)", samples) as bar:
        pruning = reconstruct(function, [step], x, y, tolerance=tolerance, within=bar.advance)
    rebuilt = (pruning.start if before is None else before.rebuilt) + (pruning.rebuilt - pruning.start)
    model = pruning.model
    tuned = None
    if child is not None:
        tuned = along(child.segments(stride), -(-child.pieces // stride), "rebuild the fine-tuned model (steps)")
    if tuned is not None:
        rebuilt, model = rebuilt + (tuned.rebuilt - tuned.start), tuned.model
    shares = shares_by_layer(function, step, x, y)
    change = pruning.model - pruning.start
    for later in child.segments() if child is not None else ():
        if later.jump:
            change = change + _difference(function, later, x, y)
            for layer, share in shares_by_layer(function, later, x, y).items():
                shares[layer] = shares[layer] + share if layer in shares else share
    left_over = change - sum(shares.values(), torch.zeros_like(change))
    sizes = {layer: float(share.abs().mean()) for layer, share in shares.items()}
    machine = _kept_alone(function, trajectory, path, mask.to(last.dtype), x, y, stride)
    found: PrunedFit = {
        **fit(rebuilt, model),
        "steps": {
            "dense": len(trajectory) if path is None else path.branch,
            "finetuning": 0 if child is None else sum(child.step(s).moved for s in range(len(child))),
        },
        "pruning_step_error": float(pruning.error.mean()),
        "evaluations_per_sample": pruning.evaluations / samples,
        "mean_change": float(change.abs().mean()),
        "by_layer": {
            layer: {"mean_change": size, "share": size / max(sum(sizes.values()), 1e-30)} for layer, size in sizes.items()
        },
        "by_layer_residual": float(left_over.abs().mean()),
    }
    weights = torch.cat([torch.full((e.size,), e.kind == "parameter") for e in trajectory.layout])
    if anew := int((weights & mask.bool() & (step.end != step.start) & (step.end != 0)).sum()):  # at 0: gone, and back later
        found["new_values"] = anew
    if before is not None and before is not dense:
        found["rewound"] = _part(before)
    if tuned is not None:
        found["finetuning"] = _part(tuned)
    return {
        "samples": samples,
        "dense": {**fit(dense.rebuilt, dense.model), "certificate": _certificate(dense)},
        "pruned": found,
        "masked_machine": {
            **fit(machine, model),
            "kl_to_pruned": kl(*map(classes, (machine, model))) if labelled else None,
        },
    }


def _kept_alone(
    function: ModelFunction, trajectory: Trajectory, path: Continued | None, mask: Tensor, x: Inputs, y: Labels, stride: int
) -> Tensor:
    """The masked kernel machine along the whole path, without the joining piece where that moves only what is masked.

    It moves what stays in the end where that was removed first and came back later. Fine-tuning after the last change of the
    mask moves kept weights alone, so there the machine's terms are the change of ``f`` itself, which needs no derivatives.
    """
    if path is None:
        with Bar("masked kernel machine (steps)", -(-trajectory.pieces // stride)) as bar:
            return masked_machine(function, trajectory.segments(stride), mask, x, y, tick=bar.advance)
    child, gone = path.child, mask == 0
    before = [n for n, s in enumerate(child.segments(stride), 1) if s.update[gone].any()]
    last = before[-1] if before else 0
    joint = [path.joint] if path.joint.update[~gone].any() else []
    pieces = chain(trajectory.segments(stride, until=path.branch), joint, islice(child.segments(stride), last))
    first = next(pieces, None)
    begin, end = path.joint.end, child.state(-1)
    for segment in islice(child.segments(stride), last):
        begin = segment.end
    tail = _difference(function, Segment(0, begin, end, torch.zeros_like(end)), x, y)
    if first is None:  # a single checkpoint, and no pruning on the way
        with torch.no_grad():
            x, y = to(x, function.device), to(y, function.device)
            return function(path.joint.start.to(function.device), x, y) + tail
    with Bar("masked kernel machine (steps)", -(-trajectory.pieces_until(path.branch) // stride) + len(joint) + last) as bar:
        return masked_machine(function, chain([first], pieces), mask, x, y, tick=bar.advance) + tail


@torch.no_grad()
def _difference(function: ModelFunction, segment: Segment, x: Inputs, y: Labels) -> Tensor:
    x, y = to(x, function.device), to(y, function.device)
    return function(segment.end.to(function.device), x, y) - function(segment.start.to(function.device), x, y)


def _part(made: Reconstruction) -> PathPart:
    return {"mean_change": float((made.model - made.start).abs().mean()), "certificate": _certificate(made)}


def _certificate(made: Reconstruction) -> Certificate:
    if not len(made.residuals):
        return {"total": 0.0, "worst_step": 0, "worst": 0.0}
    return {
        "total": float(made.residuals.sum()),
        "mean_per_step": float(made.residuals.mean()),
        "worst_step": int(made.residuals.argmax()),
        "worst": float(made.residuals.max()),
        "evaluations_per_sample_and_step": made.evaluations / len(made.start) / len(made.residuals),
    }
