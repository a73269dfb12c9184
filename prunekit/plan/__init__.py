"""Scores, structure and sparsity in, a plan out. Pure: no data, no clock."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from prunekit.batch import Inputs
from prunekit.criteria import Scores, model_digest
from prunekit.errors import ArtifactError, UsageError
from prunekit.plan.allocation import (
    ACROSS,
    ALLOCATIONS,
    INSIDE,
    Importances,
    Request,
    check_allocation,
    get_allocation,
    share,
    with_directions,
)
from prunekit.plan.channels import FREE, Sizes, channel_keeps, protected, prunable_groups
from prunekit.plan.patterns import as_stored, block_masks, nm_mask, outputs_first
from prunekit.plan.plan import ATTRIBUTES, MASKED, MIN_UNITS, OUTPUTS, REPLACE, ROUND_TO, UNIFORM, MissedTarget, Plan
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
from prunekit.structure.roles import weight_roles
from prunekit.structure.structure import Mappings
from prunekit.trajectory.bare import bare

__all__ = [
    "ACROSS", "ALLOCATIONS", "GROUPED", "STRUCTURES", "MissedTarget", "Plan", "Sizes",
    "asked_sparsity", "check_allocation", "check_sparsity", "check_structure", "choices", "make_plan",
    "plan_from",
]  # fmt: skip


def make_plan(
    scores: Scores,
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    sparsity: float | None = None,
    structure: str = "unstructured",
    allocation: str = "global",
    ratios: Mapping[str, float] | None = None,
    floor: float = 0.0,
    attention: Mappings = (),
    round_to: int = 1,
    min_units: int = 1,
    uniform: bool = False,
) -> Plan:
    """Decides what to remove from ``model``.

    Args:
        scores: made from these very weights.
        model: the trained dense model; left as it is.
        example_inputs: one or two samples, needed for ``channels``, ``heads`` and ``layers``.
        sparsity: share of prunable parameters to remove, in [0, 1). Exactly ``round(sparsity × prunable)`` weights
            go in an unstructured plan; for blocks and units it is the nearest that their order of importance passes; N:M
            says it itself (None).
        structure: a name from ``STRUCTURES``, ``module:structure``, several of units joined such as ``heads+neurons`` (which
            then compete by their importance per weight that leaves with them), or a pattern: N:M such as ``2:4``, or
            ``block:ROWSxCOLUMNS``.
        allocation: a name from ``ALLOCATIONS``; without effect on N:M, which keeps as much everywhere. ``rows`` is for
            ``unstructured``: a row is an output's weights.
        ratios: shell-style pattern of layers -> share to remove from them, whatever the allocation says; the layers are
            parameters in an unstructured plan (``conv1.weight``), and groups for channels (``conv1``).
        floor: share of every other layer that stays, in [0, 1).
        attention: projections of attention that its names do not give away, see ``prunekit.structure.units.heads``.
        round_to: what stays of a layer's channels (of heads, their number) is a multiple of this, such as 8, or all of it.
        min_units: as many channels (heads) stay in every layer at least.
        uniform: every layer keeps as many units as all others of its kind, so that layers stay alike: what goes is decided within
            each, how much by the importance of all of them. The allocation decides between kinds (heads and neurons).

    What cannot be cut is named in the plan's ``provenance["refused"]``, with the reason. Where what can be cut does not reach
    the sparsity by far, ``Plan.missed`` says so, and a ``MissedTarget`` warning is given.

    Raises:
        UsageError: sparsity out of range, unknown structure or allocation, no example inputs, or ratios and floor that
            leave too little or too much to remove.
        ArtifactError: the scores were made from other weights; both hashes are in the message.
        StructureError: the model cannot take the structure; names the layer.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, make_plan, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.75)
        >>> plan.sparsity()["prunable"], int(plan.masks()["0.weight"].sum() + plan.masks()["2.weight"].sum())
        (0.75, 12)
    """
    model = bare(model)
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
    plan = plan_from(scores, model, groups, sparsity, structure, allocation, ratios, floor, Sizes(round_to, min_units, uniform))
    if (missed := plan.missed) is not None:
        warnings.warn(missed, MissedTarget, stacklevel=2)
    return plan


def plan_from(
    scores: Scores,
    model: nn.Module,
    groups: Sequence[Group],
    sparsity: float | None,
    structure: str,
    allocation: str,
    ratios: Mapping[str, float] | None = None,
    floor: float = 0.0,
    sizes: Sizes = FREE,
) -> Plan:
    """``make_plan`` for a caller that has checked the model and found its ``groups`` already."""
    check_structure(structure)
    sizes.check(structure)
    if sizes.uniform and ratios:
        raise UsageError("uniform keeps as many units in every layer, and ratios say another share; leave one of them out")
    shared_by = get_allocation(allocation)
    check_allocation(allocation, structure)
    sparsity = asked_sparsity(structure, sparsity)
    scores.check()
    if (fault := scores.unsuited(structure)) is not None:
        raise UsageError(fault)
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | buffers
    for name, tensor in scores.importance.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ArtifactError(
                f"scores of {scores.criterion}: {name} has shape {tuple(tensor.shape)}, the model's is {shapes.get(name)}"
            )
    prunable = scores.provenance["prunable"]
    axes = {group.name: shapes.get(f"{group.name}.weight", (group.size,)) for group in groups}
    ranks: Importances = {}
    roles = weight_roles(model)
    turned = {name: roles[name].output for name in prunable if name in roles and roles[name].output}
    request = Request(sparsity, {**shapes, **axes}, ratios or {}, floor, turned)
    directions = {name: roles[name].output for name in prunable if name in roles and roles[name].direction}

    def transform(importance: Importances) -> Importances:
        if not ratios and not floor:
            return shared_by(importance, request)  # nothing is fixed, so no ranks are needed to fix it with
        ranks.update(share(importance, shared_by, request))
        return dict(ranks)

    def directed(importance: Importances, rows: bool = False) -> Importances:
        return with_directions(transform(importance), dict.fromkeys(directions, 0) if rows else directions)

    weights = {name: scores.importance[name] for name in prunable}
    pattern = pattern_of(structure)
    index: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Mapping[str, object]]] = {}
    refused = dict(getattr(groups, "refused", {}))
    if structure in GROUPED:
        of = getattr(groups, "of", {}) or {group.name: structure for group in groups}
        groups, unscored = prunable_groups(groups, prunable, protected(model, prunable, scores.provenance.get("kept", ())))
        refused |= unscored
        if not groups:
            raise UsageError(f"{structure}: nothing that can be cut may be pruned; see prunable.ignore")
        counted = {name for name, kind in of.items() if GROUPED[kind].counted}
        together = len(set(of.values())) > 1
        keep = channel_keeps(scores, groups, shapes, prunable, sparsity, transform, sizes, counted, by_weight=together)
        for group in groups:
            index |= group.index()
            if group.attributes or group.replace or group.masked:
                modules[group.name] = {ATTRIBUTES: group.attributes, REPLACE: group.replace}
            if group.masked:
                modules[group.name][MASKED] = group.masked
    elif pattern is None:
        keep = unstructured_masks(weights, sparsity, directed)
    elif pattern.kind == "nm":
        if ratios or floor:
            raise UsageError(f"{structure} keeps the same share everywhere; leave ratios and floor out")
        rows = outputs_first(weights, turned)
        keep = as_stored({name: nm_mask(values, pattern.first, pattern.second) for name, values in rows.items()}, turned)
    else:
        sharing = partial(directed, rows=True)
        rows = outputs_first(weights, turned)
        keep = as_stored(block_masks(rows, pattern, sparsity, sharing, scores.provenance["group"]), turned)
    if sizes == FREE:  # whole multiples come before ratios and floor
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
        **({ROUND_TO: sizes.round_to} if sizes.round_to > 1 else {}),
        **({MIN_UNITS: sizes.least} if sizes.least > 1 else {}),
        **({UNIFORM: True} if sizes.uniform else {}),
        **({OUTPUTS: turned} if turned and pattern is not None else {}),
    }
    if refused:
        provenance["refused"] = refused
    return Plan(structure, keep, index, shapes, provenance, modules)


def choices(structure: str, allocations: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
    """Every allocation and sparsity that makes a difference: for N:M the first allocation and the pattern's own share.

    Allocations that the structure does not take are left out, as long as it takes one of them.

    Raises:
        UsageError: it takes none of them.
    """
    implied = implied_sparsity(structure)
    if implied is not None:
        return [(allocations[0], implied)]
    fitting = [name for name in allocations if name not in INSIDE or structure == "unstructured"]
    if not fitting:
        check_allocation(allocations[0], structure)
    return [(allocation, sparsity) for allocation in fitting for sparsity in sparsities]


def _check_decided(keep: Mapping[str, Tensor], ranks: Importances) -> None:
    """What ratios and floor decide must have been carried out."""
    for name, rank in ranks.items():
        if name not in keep or keep[name].shape != rank.shape:
            continue  # blocks and whole layers compete in a shape of their own
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
