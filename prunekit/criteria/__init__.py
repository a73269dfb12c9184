"""Trajectory, model and data in, scores out: a plain dict from name to criterion, one entry function.

A new criterion is one file with a ``CRITERION`` and one line in ``CRITERIA``; options, products, ranks, file names, recipe
and command line follow from there (``prunekit.criteria.spec`` has the syntax of names). One of the user's own needs no line:
``module:name`` stands wherever a name does (``prunekit.criteria.own``), and packages offer theirs under ``prunekit.criteria``.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from prunekit import ranks
from prunekit.criteria import (
    block_influence,
    fisher,
    flap,
    gradient,
    grasp,
    influence,
    kfac,
    lamp,
    magnitude,
    movement,
    obs,
    random,
    reap,
    snip,
    spec,
    synflow,
    taylor,
    wanda,
)
from prunekit.criteria.aggregations import AGGREGATIONS, written
from prunekit.criteria.compose import compose, temper
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.identity import model_digest, state_digest
from prunekit.criteria.online import OnlineInfluence
from prunekit.criteria.own import as_criterion, source
from prunekit.criteria.scores import Scores
from prunekit.criteria.spec import Single, Spec
from prunekit.errors import NonFiniteError, PrunekitError, StructureError, UsageError, check_seed, nearest
from prunekit.kernel import SHARES, get_rule
from prunekit.registry import Registry
from prunekit.structure.prunable import kept_layers, prunable_parameters
from prunekit.task import Target, Task
from prunekit.task.losses import CROSS_ENTROPY
from prunekit.task.settle import settle
from prunekit.trajectory import Trajectory
from prunekit.trajectory.bare import bare
from prunekit.trajectory.derived import unmaskable

__all__ = [
    "AGGREGATIONS", "CRITERIA", "DEFAULT", "Criterion", "CriterionResult", "Evidence", "OnlineInfluence", "Scores", "Single",
    "Spec", "check_criterion", "check_options", "compose", "expand", "get_criterion", "model_digest", "parse", "provenance",
    "score", "score_evidence", "score_slug", "state_digest", "temper",
]  # fmt: skip

CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    "prunekit.criteria",
    as_criterion,
    {
        "influence": influence.CRITERION,
        "survival": influence.SURVIVAL,
        "lca": influence.LCA,
        "magnitude": magnitude.CRITERION,
        "gradient": gradient.CRITERION,
        "taylor": taylor.CRITERION,
        "fisher": fisher.CRITERION,
        "lamp": lamp.CRITERION,
        "snip": snip.CRITERION,
        "grasp": grasp.CRITERION,
        "synflow": synflow.CRITERION,
        "obs": obs.CRITERION,
        "kfac": kfac.CRITERION,
        "wanda": wanda.CRITERION,
        "movement": movement.CRITERION,
        "flap": flap.CRITERION,
        "reap": reap.CRITERION,
        "block_influence": block_influence.CRITERION,
        "random": random.CRITERION,
    },
)
DEFAULT = ("influence", "magnitude", "gradient", "taylor", "random")
"""What a recipe scores when it says nothing."""


GATHERED = (
    "trajectory", "model", "prunable", "data", "task", "target", "seed", "device", "kept", "at", "options", "partial",
    "partial_key", "spread",
)  # fmt: skip
"""Fields of ``Evidence`` that are no options of ``score``."""


def expand(text: str) -> list[str]:
    """Canonical names of what ``text`` names: one, or for ``tempered(...)`` the compositions that it stands for.

    Raises:
        UsageError: see ``prunekit.criteria.spec.parse``.
    """
    return [found.text for found in spec.parse(text, CRITERIA)]


def check_criterion(text: str) -> None:
    """Checks what ``text`` names, importing what is not prunekit's own.

    Raises:
        UsageError: see ``prunekit.criteria.spec.parse``; or a user's own criterion cannot be imported, is none, or does not take
            an option that it is given.
    """
    for found in spec.parse(text, CRITERIA):
        for single in found.singles:
            _chosen(single)


def parse(text: str) -> Spec:
    """The one criterion or composition that ``text`` names.

    Raises:
        UsageError: see ``prunekit.criteria.spec.parse``; or it names several (``tempered``).
    """
    found = spec.parse(text, CRITERIA)
    if len(found) > 1:
        raise UsageError(f"criterion {text!r} stands for {len(found)} compositions; name one, such as {found[2].text!r}")
    return found[0]


def score_slug(text: str) -> str:
    """The file name, without its ending, of the scores that ``text`` names; see ``prunekit.criteria.spec``."""
    return spec.slug(parse(text))


def get_criterion(text: str) -> Criterion:
    """Looks a criterion up, its options aside.

    Raises:
        UsageError: unknown, near names are offered; or a composition.
    """
    return _chosen(_single(text))


def _chosen(single: Single) -> Criterion:
    found = CRITERIA[single.name]
    spec.check_accepted(single.text, single.name, dict(single.options), found.accepts)
    return found


def _single(text: str) -> Single:
    found = parse(text)
    if not isinstance(found, Single):
        raise UsageError(f"criterion {text!r} is composed; score its parts and compose them (prunekit.criteria.compose)")
    return found


def _looking(evidence: Evidence, text: str) -> tuple[str, Criterion, Evidence]:
    """Canonical name, criterion, and the evidence as the name's options want it."""
    single = _single(text)
    chosen = _chosen(single)
    options = {**chosen.preset, **dict(single.options)}
    fields: dict[str, Any] = {key: options[key] for key in ("target", "share", "aggregation") if key in options}
    if "nodes" in options:
        fields["nodes"] = int(options["nodes"])
    return single.text, chosen, replace(evidence, options=options, **fields)


def score(
    trajectory: Trajectory,
    model: nn.Module,
    batches: Any = (),
    criterion: str = "influence",
    *,
    task: str | Task | None = None,
    target: str | Target | None = None,
    loss: Any = None,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Scores:
    """Scores every prunable weight of the trained model (the trajectory's last state).

    Args:
        trajectory: the recorded path.
        model: the recorded architecture; its own weights are not used.
        batches: scoring samples: batches ``(inputs, labels)`` or mappings with labels among them, a data set, or a
            ``DataLoader``, which are read batch by batch.
        criterion: a name from ``CRITERIA`` or ``module:name``, with options or composed: see ``prunekit.criteria.spec``.
        task: what the model is for, a name from ``prunekit.task.TASKS`` or a ``Task``; None where samples leave no doubt.
        target: what influence explains, a name that the task has or a function; the task's own when None.
        loss: ``(outputs, labels) -> scalar``, for criteria that look at it; the task's own when None.
        ignore: shell-style patterns of parameters that may not be pruned; a layer that one covers whole (``0.*``) loses nothing,
            whatever is cut.
        include: patterns of parameters to prune that are no layer's weights, see ``prunekit.structure.roles``.
        seed: for ``random``.
        options: how influence looks at the path: ``nodes``, ``rule``, ``early``, ``tolerance``, ``stride``, ``share``,
            ``aggregation``, ``phase``, ``memory``; ``skip_unfit``: what wanda or obs cannot score, by magnitude (their findings
            name it); see ``Evidence``.

    Raises:
        UsageError: unknown criterion or pattern.
        PrunekitError: the criterion needs a path or data that is not there.
        NonFiniteError: NaN or Inf in the trajectory or in the scores.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(32, 4)
        >>> scores = score(Trajectory.of(model), model, [(x, x[:, 0].gt(0).long())], criterion="taylor", ignore=["2.*"])
        >>> {name: tuple(importance.shape) for name, importance in scores.importance.items()}
        {'0.weight': (8, 4)}
    """
    evidence = gather(
        trajectory, model, batches, task=task, target=target, loss=loss, ignore=ignore, include=include, seed=seed, device=device,
        **options,
    )  # fmt: skip
    return score_gathered(evidence, criterion)


def score_gathered(evidence: Evidence, criterion: str) -> Scores:
    """``score`` of what is gathered already; the samples are looked at first, where the criterion needs any."""
    wanted = parse(criterion)
    if evidence.data is not None and any(_chosen(part).needs_data for part in wanted.singles):
        evidence.check()
    return compose(wanted, {part.text: score_evidence(evidence, part.text) for part in wanted.singles})


def gather(
    trajectory: Trajectory,
    model: nn.Module,
    batches: Any = (),
    *,
    task: str | Task | None = None,
    target: str | Target | None = None,
    loss: Any = None,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Evidence:
    """What criteria look at, from the arguments of ``score``.

    Raises:
        UsageError: an option, a pattern or a task does not exist.
    """
    check_seed(seed)
    known = [each.name for each in fields(Evidence) if each.name not in GATHERED]
    for name in options:
        if name not in known:
            raise UsageError(f"score has no option {name!r}; {nearest(name, known)}")
    model = bare(model)
    trajectory.layout.check(model)
    ignored, included = ([given] if isinstance(given, str) else list(given) for given in (ignore, include))
    prunable = tuple(prunable_parameters(model, trajectory.layout, ignored, included))
    kept = tuple(kept_layers(model, ignored))
    where = torch.device(device)
    kind, data = settle(model, batches, task, loss)
    explained = kind.target if target is None else target
    evidence = Evidence(trajectory, model, prunable, data, kind, explained, seed, **options, device=where, kept=kept)
    check_options(evidence)
    return evidence


def check_options(evidence: Evidence) -> None:
    """Raises UsageError for a share, aggregation, rule, tolerance or phase that does not exist."""
    for what, value, known in (
        ("share", evidence.share, list(SHARES)),
        ("aggregation", evidence.aggregation, list(AGGREGATIONS)),
    ):
        if value not in known:
            raise UsageError(f"{what} {value!r} does not exist; {nearest(value, known)}")
    get_rule(evidence.rule, evidence.nodes)
    evidence.task.get_target(evidence.target)
    if evidence.early is not None and not (evidence.early[0] >= 1 and evidence.early[1] >= 1):
        raise UsageError(f"early is {evidence.early}; it must be (steps, nodes), each at least 1")
    if evidence.tolerance is not None and not evidence.tolerance > 0:
        raise UsageError(f"tolerance is {evidence.tolerance}; it must be above 0")
    steps = len(evidence.trajectory)
    if evidence.phase is not None and not 0 <= evidence.phase[0] < evidence.phase[1] <= max(steps, 1):
        raise UsageError(f"phase is {evidence.phase}; it must be begin < end within the {steps} recorded steps")


def score_evidence(evidence: Evidence, criterion: str) -> Scores:
    """``score`` for a caller that has gathered the evidence already, and of one criterion, not a composition."""
    facts = provenance(evidence, criterion)
    _, chosen, looking = _looking(evidence, criterion)
    for name, fault in unmaskable(evidence.model, evidence.prunable).items():
        raise StructureError(f"{name} cannot be pruned: {fault}")
    started = time.perf_counter()
    found = chosen.compute(replace(looking, partial_key=facts))
    importance, sums = ranks.same(found.importance), ranks.same(found.axis_sums)  # whatever one of the user's own drew
    findings = dict(found.findings)
    if (
        chosen.needs_data and not {"shift", "uncovered"} & findings.keys()
    ):  # a shifted 0 is the lowest score, not an untouched weight
        findings["uncovered"] = {n: count for n, v in found.importance.items() if (count := int((v == 0).sum()))}
    cost = {
        "seconds": round(time.perf_counter() - started, 3),
        "peak_mb": peak_memory_mb(),
        "gradient_evaluations": found.gradient_evaluations,
    }
    scores = Scores(importance, sums, facts, findings, cost, found.parts)
    try:
        scores.check()
    except NonFiniteError:
        evidence.check_inputs()  # which is why, more often than not
        raise
    return scores


def _check_spread(evidence: Evidence, name: str, chosen: Criterion) -> None:
    """Raises UsageError where a criterion cannot be computed a part of the model at a time."""
    if not chosen.spreads:
        fitting = ", ".join(known for known in CRITERIA if CRITERIA[known].spreads)
        raise UsageError(
            f"{name} looks at the whole model at once (at other weights, by second derivatives, or by code of your own), and "
            f"--device-map computes it a block at a time; that goes with {fitting}"
        )
    asked = evidence.options.get("target", "loss")
    if asked != "loss":
        raise UsageError(f"{name}: with --device-map taylor and fisher are of the loss; leave target={asked} out")
    if chosen.needs_data and evidence.spread is not None:
        evidence.samples()
        evidence.spread.check()


def provenance(evidence: Evidence, criterion: str) -> dict[str, Any]:
    """What scores of ``criterion`` made from ``evidence`` say of their making; known before they are made.

    Raises:
        UsageError: there is no such criterion.
        PrunekitError: the criterion needs a path or data that is not there.
    """
    name, chosen, evidence = _looking(evidence, criterion)
    trajectory = evidence.trajectory
    if chosen.needs_path and len(trajectory) == 0:
        raise PrunekitError(
            f"{name} needs a training path of at least two states, {trajectory.folder} has one; record one with "
            "prunekit.Recorder, or import several checkpoints (--weights early.safetensors --weights late.safetensors)"
        )
    if evidence.spread is not None:
        _check_spread(evidence, name, chosen)
    aggregation = evidence.options.get("aggregation") or chosen.aggregation
    facts: dict[str, Any] = {
        "criterion": name,
        "group": evidence.options.get("group", chosen.group),
        "aggregation": aggregation or (written(evidence.aggregation) if chosen.group == "sum" else None),
        "trajectory": evidence.trajectory.hash,
        "model": state_digest(evidence.state),
        "prunable": list(evidence.prunable),
        **({"kept": list(evidence.kept)} if evidence.kept else {}),
    }
    if chosen.structure is not None:
        facts["structure"] = chosen.structure
        if evidence.attention:
            facts["attention"] = [one if isinstance(one, str) else dict(one) for one in evidence.attention]
    if chosen.silent_on:
        facts["silent_on"] = list(chosen.silent_on)
    single = Single.of(name)
    if not CRITERIA.is_own(single.name):
        facts["code"] = {"path": CRITERIA.path(single.name), "source": source(chosen.compute)}
    if evidence.half:
        facts["compute_dtype"] = "float32"
    if chosen.needs_data:
        samples = evidence.samples()
        facts |= {"samples": len(samples), "data": samples.digest()}
        if evidence.task.facts():
            facts["task"] = evidence.task.facts()
    if chosen.needs_path:
        facts |= {
            "stride": evidence.stride,
            "phase": None if evidence.phase is None else list(evidence.phase),
            "note": evidence.trajectory.rule_note,
            **({"optimizer_rules": trajectory.foreign_rules} if trajectory.foreign_rules else {}),
        }
    if chosen.needs_path and chosen.needs_data:
        facts |= {
            "target": _named(evidence.target),
            "share": evidence.share,
            "rule": evidence.rule,
            "nodes": evidence.nodes,
            "early": None if evidence.early is None else list(evidence.early),
            "tolerance": evidence.tolerance,
            "memory": evidence.memory,
        }
        if evidence.target == "loss" and evidence.task.loss.path != CROSS_ENTROPY:
            facts["loss"] = evidence.task.loss.path
    elif chosen.needs_data:
        facts["loss"] = evidence.task.loss.path
        if "target" in evidence.options:
            facts["target"] = evidence.options["target"]
    if chosen.needs_data and evidence.classes:
        facts["classes"] = list(evidence.classes)
    if chosen.by_inputs and evidence.skip_unfit:
        facts["skip_unfit"] = True
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
