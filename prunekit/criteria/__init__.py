"""Trajectory, model and data in, scores out: a plain dict from name to criterion, one entry function."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.criteria import gradient, influence, magnitude, random, taylor
from prunekit.criteria.evidence import Criterion, Evidence, Loss
from prunekit.criteria.identity import model_digest, state_digest
from prunekit.criteria.online import OnlineInfluence
from prunekit.criteria.scores import AGGREGATIONS, Scores
from prunekit.errors import PrunekitError, UsageError, nearest
from prunekit.kernel import SHARES, Target, get_rule, get_target
from prunekit.structure.prunable import prunable_parameters
from prunekit.trajectory import Trajectory

__all__ = [
    "AGGREGATIONS", "CRITERIA", "Criterion", "Evidence", "OnlineInfluence", "Scores", "check_options", "get_criterion",
    "model_digest", "provenance", "score", "score_evidence", "state_digest",
]  # fmt: skip

CRITERIA: dict[str, Criterion] = {
    "influence": influence.CRITERION,
    "magnitude": magnitude.CRITERION,
    "gradient": gradient.CRITERION,
    "taylor": taylor.CRITERION,
    "random": random.CRITERION,
}


def get_criterion(name: str) -> Criterion:
    """Looks a criterion up.

    Raises:
        UsageError: unknown; near names are offered.
    """
    if name not in CRITERIA:
        raise UsageError(f"criterion {name!r} does not exist; {nearest(name, list(CRITERIA))}")
    return CRITERIA[name]


def score(
    trajectory: Trajectory,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    criterion: str = "influence",
    *,
    target: str | Target = "outputs",
    loss: Loss = F.cross_entropy,
    ignore: Iterable[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Scores:
    """Scores every prunable weight of the trained model (the trajectory's last state).

    Args:
        trajectory: the recorded path.
        model: the recorded architecture; its own weights are not used.
        batches: scoring samples as ``(inputs, labels)``.
        criterion: a name from ``CRITERIA``.
        target: what influence explains, a name from ``prunekit.kernel.TARGETS`` or a function.
        loss: mean loss for ``gradient`` and ``taylor``.
        ignore: shell-style patterns of parameters that may not be pruned.
        seed: for ``random``.
        options: how influence looks at the path: ``nodes``, ``rule``, ``early``, ``tolerance``, ``stride``, ``share``,
            ``aggregation``, ``phase``, ``memory``; see ``Evidence``.

    Raises:
        UsageError: unknown criterion or pattern.
        PrunekitError: the criterion needs a path or data that is not there.
        NonFiniteError: NaN or Inf in the trajectory or in the scores.
    """
    trajectory.layout.check(model)
    prunable = tuple(prunable_parameters(trajectory.layout, list(ignore)))
    pairs = list(batches)
    x = torch.cat([pair[0] for pair in pairs]) if pairs else None
    y = torch.cat([pair[1] for pair in pairs]) if pairs else None
    where = torch.device(device)
    evidence = Evidence(trajectory, model, prunable, x, y, loss, target, seed, **options, device=where)
    check_options(evidence)
    return score_evidence(evidence, criterion)


def check_options(evidence: Evidence) -> None:
    """Raises UsageError for a share, aggregation, rule, tolerance or phase that does not exist."""
    for what, value, known in (
        ("share", evidence.share, list(SHARES)),
        ("aggregation", evidence.aggregation, list(AGGREGATIONS)),
    ):
        if value not in known:
            raise UsageError(f"{what} {value!r} does not exist; {nearest(value, known)}")
    get_rule(evidence.rule, evidence.nodes)
    get_target(evidence.target)
    if evidence.early is not None and not (evidence.early[0] >= 1 and evidence.early[1] >= 1):
        raise UsageError(f"early is {evidence.early}; it must be (steps, nodes), each at least 1")
    if evidence.tolerance is not None and not evidence.tolerance > 0:
        raise UsageError(f"tolerance is {evidence.tolerance}; it must be above 0")
    steps = len(evidence.trajectory)
    if evidence.phase is not None and not 0 <= evidence.phase[0] < evidence.phase[1] <= max(steps, 1):
        raise UsageError(f"phase is {evidence.phase}; it must be begin < end within the {steps} recorded steps")


def score_evidence(evidence: Evidence, criterion: str) -> Scores:
    """``score`` for a caller that has gathered the evidence already."""
    chosen = get_criterion(criterion)
    facts = provenance(evidence, criterion)
    started = time.perf_counter()
    found = chosen.compute(replace(evidence, partial_key=facts))
    findings = dict(found.findings)
    if chosen.needs_data:
        findings["uncovered"] = {n: count for n, v in found.importance.items() if (count := int((v == 0).sum()))}
    cost = {"seconds": round(time.perf_counter() - started, 3), "peak_mb": peak_memory_mb()}
    scores = Scores(found.importance, found.axis_sums, facts, findings, cost)
    scores.check()
    return scores


def provenance(evidence: Evidence, criterion: str) -> dict[str, Any]:
    """What scores of ``criterion`` made from ``evidence`` say of their making; known before they are made.

    Raises:
        PrunekitError: the criterion needs a path or data that is not there.
    """
    chosen = get_criterion(criterion)
    trajectory = evidence.trajectory
    if chosen.needs_path and len(trajectory) == 0:
        raise PrunekitError(
            f"{criterion} needs a training path of at least two states, {trajectory.folder} has one; record one with "
            "prunekit.Recorder, or import several checkpoints (--weights early.safetensors --weights late.safetensors)"
        )
    facts: dict[str, Any] = {
        "criterion": criterion,
        "group": chosen.group,
        "aggregation": chosen.aggregation or (evidence.aggregation if chosen.group == "sum" else None),
        "trajectory": evidence.trajectory.hash,
        "model": state_digest(evidence.state),
        "prunable": list(evidence.prunable),
    }
    if chosen.needs_data:
        x, y = evidence.samples()
        facts |= {"samples": len(x), "data": checkpoint.digest({"x": x, "y": y})}
    if chosen.needs_path:
        facts |= {
            "target": _named(evidence.target),
            "share": evidence.share,
            "rule": evidence.rule,
            "nodes": evidence.nodes,
            "early": None if evidence.early is None else list(evidence.early),
            "tolerance": evidence.tolerance,
            "stride": evidence.stride,
            "phase": None if evidence.phase is None else list(evidence.phase),
            "memory": evidence.memory,
            "note": evidence.trajectory.rule_note,
        }
    elif chosen.needs_data:
        facts["loss"] = _named(evidence.loss)
    if chosen.group == "draw":
        facts["seed"] = evidence.seed
    return facts


def peak_memory_mb() -> int:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)


def _named(thing: object) -> str:
    if isinstance(thing, str):
        return thing
    return f"{getattr(thing, '__module__', '?')}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"
