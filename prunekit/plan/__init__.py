"""Scores, structure and sparsity in, a plan out. Pure: no data, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from prunekit.criteria import Scores, model_digest
from prunekit.errors import ArtifactError, UsageError, nearest
from prunekit.plan.allocation import ALLOCATIONS, Importances, Request, get_allocation, share
from prunekit.plan.channels import channel_keeps
from prunekit.plan.plan import Plan
from prunekit.plan.unstructured import unstructured_masks
from prunekit.structure import ChannelGroup, channel_groups

__all__ = ["ALLOCATIONS", "STRUCTURES", "Plan", "check_sparsity", "check_structure", "make_plan", "plan_from"]

STRUCTURES = ("unstructured", "channels")


def make_plan(
    scores: Scores,
    model: nn.Module,
    example_inputs: Tensor | None = None,
    *,
    sparsity: float,
    structure: str = "unstructured",
    allocation: str = "global",
    ratios: Mapping[str, float] | None = None,
    floor: float = 0.0,
) -> Plan:
    """Decides what to remove from ``model``.

    Args:
        scores: made from these very weights.
        model: the trained dense model; left as it is.
        example_inputs: one or two samples, needed for ``structure="channels"``.
        sparsity: share of prunable parameters to remove, in [0, 1). Exactly ``round(sparsity × prunable)`` weights
            go in an unstructured plan; for channels it is the nearest that their order of importance passes.
        structure: a name from ``STRUCTURES``.
        allocation: a name from ``ALLOCATIONS``.
        ratios: shell-style pattern of layers -> share to remove from them, whatever the allocation says; the layers are
            parameters in an unstructured plan (``conv1.weight``), and groups for channels (``conv1``).
        floor: share of every other layer that stays, in [0, 1).

    Raises:
        UsageError: sparsity out of range, unknown structure or allocation, no example inputs, or ratios and floor that
            leave too little or too much to remove.
        ArtifactError: the scores were made from other weights; both hashes are in the message.
        StructureError: the model cannot take the structure; names the layer.
    """
    found = model_digest(model)
    if scores.provenance["model"] != found:
        raise ArtifactError(
            f"scores of {scores.criterion} were made from model {scores.provenance['model']}, this model is {found}"
        )
    check_structure(structure)
    groups: list[ChannelGroup] = []
    if structure == "channels":
        if example_inputs is None:
            raise UsageError("structure 'channels' needs example_inputs (one or two samples) to trace the model")
        groups = channel_groups(model, example_inputs)
    return plan_from(scores, model, groups, sparsity, structure, allocation, ratios, floor)


def plan_from(
    scores: Scores,
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    sparsity: float,
    structure: str,
    allocation: str,
    ratios: Mapping[str, float] | None = None,
    floor: float = 0.0,
) -> Plan:
    """``make_plan`` for a caller that has checked the model and traced its ``groups`` already."""
    check_sparsity(sparsity)
    check_structure(structure)
    shared_by = get_allocation(allocation)
    scores.check()
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | buffers
    for name, tensor in scores.importance.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ArtifactError(
                f"scores of {scores.criterion}: {name} has shape {tuple(tensor.shape)}, the model's is {shapes.get(name)}"
            )
    prunable = scores.provenance["prunable"]
    weights = {group.name: shapes.get(f"{group.name}.weight", (group.size,)) for group in groups}
    request = Request(sparsity, {**shapes, **weights}, ratios or {}, floor)
    ranks: Importances = {}

    def transform(importance: Importances) -> Importances:
        ranks.update(share(importance, shared_by, request))
        return dict(ranks)

    index: dict[str, Tensor] = {}
    if structure == "unstructured":
        keep = unstructured_masks({name: scores.importance[name] for name in prunable}, sparsity, transform)
    else:
        keep = channel_keeps(scores, groups, shapes, prunable, sparsity, transform)
        index = {f"{group.name}|{member}": where for group in groups for member, where in group.members.items()}
    _check_decided(keep, ranks)
    provenance = {
        "criterion": scores.criterion,
        "scores": scores.digest,
        "model": scores.provenance["model"],
        "trajectory": scores.provenance["trajectory"],
        "allocation": allocation,
        "sparsity": sparsity,
        "prunable": prunable,
        "buffers": list(buffers),
        **({"ratios": dict(ratios)} if ratios else {}),
        **({"floor": floor} if floor else {}),
    }
    return Plan(structure, keep, index, shapes, provenance)


def _check_decided(keep: Mapping[str, Tensor], ranks: Importances) -> None:
    """What ratios and floor decide must have been carried out."""
    for name, rank in ranks.items():
        if keep[name].shape != rank.shape:
            continue  # a pattern of its own, such as blocks
        if bool((keep[name] & (rank < 0)).any()):
            raise UsageError(f"ratios: they remove more than the sparsity asked for ({name} would lose less than its ratio)")
        if bool((~keep[name] & (rank > 1)).any()):
            raise UsageError(
                f"ratios and floor keep too much for the sparsity asked for ({name} would lose more than they allow)"
            )


def check_sparsity(sparsity: float) -> None:
    """Raises UsageError unless ``sparsity`` lies in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is {sparsity}; it must be at least 0 and below 1 (the share of weights removed)")


def check_structure(structure: str) -> None:
    """Raises UsageError for an unknown structure."""
    if structure not in STRUCTURES:
        raise UsageError(f"structure {structure!r} does not exist; {nearest(structure, list(STRUCTURES))}")
