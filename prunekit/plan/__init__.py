"""Scores, structure and sparsity in, a plan out. Pure: no data, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from prunekit.criteria import Scores, model_digest
from prunekit.errors import ArtifactError, UsageError
from prunekit.plan.allocation import ALLOCATIONS, get_allocation
from prunekit.plan.channels import channel_keeps, prunable_groups
from prunekit.plan.patterns import block_masks, nm_mask
from prunekit.plan.plan import ATTRIBUTES, REPLACE, Plan
from prunekit.plan.unstructured import unstructured_masks
from prunekit.structure import (
    GROUPED,
    STRUCTURES,
    Group,
    asked_sparsity,
    check_structure,
    find_groups,
    implied_sparsity,
    pattern_of,
)
from prunekit.structure.heads import Mappings

__all__ = [
    "ALLOCATIONS", "GROUPED", "STRUCTURES", "Plan", "asked_sparsity", "check_sparsity", "check_structure", "choices", "make_plan",
    "plan_from",
]  # fmt: skip


def make_plan(
    scores: Scores,
    model: nn.Module,
    example_inputs: Tensor | None = None,
    *,
    sparsity: float | None = None,
    structure: str = "unstructured",
    allocation: str = "global",
    attention: Mappings = (),
) -> Plan:
    """Decides what to remove from ``model``.

    Args:
        scores: made from these very weights.
        model: the trained dense model; left as it is.
        example_inputs: one or two samples, needed for ``channels``, ``heads`` and ``layers``.
        sparsity: share of prunable parameters to remove, in [0, 1). Exactly ``round(sparsity × prunable)`` weights
            go in an unstructured plan; for blocks and units it is the nearest that their order of importance passes; N:M
            says it itself (None).
        structure: a name from ``STRUCTURES``, or a pattern: N:M such as ``2:4``, or ``block:ROWSxCOLUMNS``.
        allocation: a name from ``ALLOCATIONS``; without effect on N:M, which keeps as much everywhere.
        attention: projections of attention that its names do not give away, see ``prunekit.structure.heads``.

    What cannot be cut is named in the plan's ``provenance["refused"]``, with the reason.

    Raises:
        UsageError: sparsity out of range, unknown structure or allocation, no example inputs.
        ArtifactError: the scores were made from other weights; both hashes are in the message.
        StructureError: the model cannot take the structure; names the layer.
    """
    found = model_digest(model)
    if scores.provenance["model"] != found:
        raise ArtifactError(
            f"scores of {scores.criterion} were made from model {scores.provenance['model']}, this model is {found}"
        )
    check_structure(structure)
    sparsity = asked_sparsity(structure, sparsity)
    groups: Sequence[Group] = ()
    if structure in GROUPED:
        if example_inputs is None:
            raise UsageError(f"structure {structure!r} needs example_inputs (one or two samples) to trace the model")
        groups = find_groups(structure, model, example_inputs, attention)
    return plan_from(scores, model, groups, sparsity, structure, allocation)


def plan_from(
    scores: Scores, model: nn.Module, groups: Sequence[Group], sparsity: float | None, structure: str, allocation: str
) -> Plan:
    """``make_plan`` for a caller that has checked the model and found its ``groups`` already."""
    check_structure(structure)
    sparsity = asked_sparsity(structure, sparsity)
    transform = get_allocation(allocation)
    scores.check()
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | buffers
    for name, tensor in scores.importance.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ArtifactError(
                f"scores of {scores.criterion}: {name} has shape {tuple(tensor.shape)}, the model's is {shapes.get(name)}"
            )
    prunable = scores.provenance["prunable"]
    weights = {name: scores.importance[name] for name in prunable}
    pattern = pattern_of(structure)
    index: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Mapping[str, object]]] = {}
    refused = dict(getattr(groups, "refused", {}))
    if structure in GROUPED:
        groups, unscored = prunable_groups(groups, prunable)
        refused |= unscored
        if not groups:
            raise UsageError(f"{structure}: nothing that can be cut may be pruned; see prunable.ignore")
        keep = channel_keeps(scores, groups, shapes, prunable, sparsity, transform)
        for group in groups:
            index |= group.index()
            if group.attributes or group.replace:
                modules[group.name] = {ATTRIBUTES: group.attributes, REPLACE: group.replace}
    elif pattern is None:
        keep = unstructured_masks(weights, sparsity, transform)
    elif pattern.kind == "nm":
        keep = {name: nm_mask(values, pattern.first, pattern.second) for name, values in weights.items()}
    else:
        keep = block_masks(weights, pattern, sparsity, transform, scores.provenance["group"])
    provenance = {
        "criterion": scores.criterion,
        "scores": scores.digest,
        "model": scores.provenance["model"],
        "trajectory": scores.provenance["trajectory"],
        "allocation": allocation,
        "sparsity": sparsity,
        "prunable": prunable,
        "buffers": list(buffers),
    }
    if refused:
        provenance["refused"] = refused
    return Plan(structure, keep, index, shapes, provenance, modules)


def choices(structure: str, allocations: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
    """Every allocation and sparsity that makes a difference: for N:M the first allocation and the pattern's own share."""
    implied = implied_sparsity(structure)
    if implied is not None:
        return [(allocations[0], implied)]
    return [(allocation, sparsity) for allocation in allocations for sparsity in sparsities]


def check_sparsity(sparsity: float) -> None:
    """Raises UsageError unless ``sparsity`` lies in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is {sparsity}; it must be at least 0 and below 1 (the share of weights removed)")
