"""prune, in steps: a schedule, fine-tuning, rewinding and new BatchNorm statistics, written as one pruned model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunekit.criteria import Evidence, Scores, provenance
from prunekit.durable import replacing_folder
from prunekit.errors import ArtifactError
from prunekit.imports import load_object
from prunekit.plan import GROUPED
from prunekit.recipe import Steps
from prunekit.reusing import first_difference
from prunekit.steps import Finetuning, Planner, RefineAgain, Schedule, cut, leaves, prune_by_schedule
from prunekit.steps.by_schedule import Start
from prunekit.steps.planner import Repair
from prunekit.training import recalibrate
from prunekit.verbs.pruned_folder import write_beside
from prunekit.verbs.run_folder import Run
from prunekit.verbs.tuning import check_room, end_of, finetuning_of
from prunekit.verbs.validation import validation_of


def prune_in_steps(
    run: Run,
    folder: Path,
    planner: Planner,
    sparsity: float,
    steps: Steps,
    request: Mapping[str, Any],
    made_for: Mapping[str, Any] | None = None,
    found: Mapping[str, Any] | None = None,
    again: RefineAgain | None = None,
    last: Callable[[torch.nn.Module], Mapping[str, Any]] | None = None,
    start: Start | None = None,
) -> dict[str, Any]:
    """Writes ``folder``, whole or not at all: the pruned model, and in ``trajectory/`` its fine-tuning steps.

    Args:
        request: what of training and schedule decides the result, for reuse.
        made_for: what the plan says that it was made for; None for a plan that says it already.
        found: further facts for the manifest.
        again: refine what was fine-tuned again.
        last: facts that are measured on the finished model.
        start: what fine-tuning begins from, see ``prune_by_schedule``.

    Returns:
        the facts that its manifest tells.

    Raises:
        ArtifactError: the scores cannot be made again with the recipe's options, or the disk is full.
    """
    started = time.perf_counter()
    how = finetuning_of(run, steps) if steps.trains else None
    check_room(run, steps)
    adapted = None if how is None else how.adapted(run.model, run.evidence.prunable)
    schedule = Schedule(**steps.schedule.model_dump())
    torch.manual_seed(run.recipe.seed if how is None else how.seed)  # dropout
    norms: list[int] = []

    def measured_anew(model: torch.nn.Module) -> None:
        norms.append(recalibrate(model, run.splits["train"].samples()))

    validation = validation_of(run)
    figure = None if validation is None else validation.figure

    with replacing_folder(folder) as temporary:
        done = prune_by_schedule(
            run.model,
            planner,
            sparsity,
            schedule,
            how=how,
            rewind=steps.rewind,
            end=None if how is None else end_of(run, steps),
            recalibrate=measured_anew if steps.recalibrate else None,
            folder=None if how is None else temporary / "trajectory",
            measure=figure,
            again=again,
            start=start,
        )
        plan = done.plan if made_for is None else done.plan.saying(request=dict(made_for))
        small = cut(done.model, plan, run.example if plan.smaller else None)
        facts: dict[str, Any] = {
            **(found or {}),
            **(last(small) if last is not None else {}),
            "request": dict(request),
            "schedule": {**steps.schedule.model_dump(mode="json"), "rounds": sum("again" not in r for r in done.rounds)},
            "finetune": None
            if how is None
            else _told(steps, how, done.rounds) | ({} if adapted is None else {"lora": adapted.facts()}),
            "rewind": steps.rewind,
            "recalibrated": norms[-1] if norms else None,
            "rounds": done.rounds,
        }
        if figure is not None:
            facts[f"validation_{figure.name}_pruned"] = done.rounds[-1][f"{figure.name}_pruned"]
        facts["cost"] = {"seconds": round(time.perf_counter() - started, 3)}
        return write_beside(run, small, plan, temporary, facts, validation)


def planner_for(
    run: Run,
    scores: Scores,
    structure: str,
    allocation: str,
    steps: Steps,
    options: Mapping[str, Any] | None = None,
    repair: Repair | None = None,
) -> Planner:
    """Plans by ``scores`` of the dense model, and by new ones in later rounds.

    Args:
        options: further ones of ``make_plan``.
        repair: refines every plan, see ``Planner``.

    Raises:
        ArtifactError: later rounds could not score as ``scores`` were made.
    """
    evidence = run.evidence if steps.schedule.name == "one-shot" else _evidence(run, scores)
    return Planner(evidence, scores, structure, allocation, run.example if structure in GROUPED else None, options, repair)


def _told(steps: Steps, how: Finetuning, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    asked = steps.of_training()
    return {
        "epochs": how.epochs if steps.rewind is None else None,
        "steps": sum(r["steps"] for r in rounds),
        "seeds": list(dict.fromkeys(r["seed"] for r in rounds)),
        **({"tokens": asked.tokens} if asked.tokens is not None else {}),
        **({"rates": [r["rate"] for r in rounds]} if how.rate is not None else {}),
        "distill": asked.distill.model_dump(mode="json") if asked.distill else None,
    }


def _evidence(run: Run, scores: Scores) -> Evidence:
    """What the scores were made from, to score again in later rounds.

    Raises:
        ArtifactError: it cannot be had again: the scores were made with samples or options that this run does not say.
    """
    found: dict[str, Any] = {}
    for leaf in leaves(scores):
        facts = leaf.provenance
        names = ("share", "rule", "nodes", "tolerance", "stride", "memory", "seed", "skip_unfit")
        found |= {name: facts[name] for name in names if name in facts}
        for name in ("phase", "early"):
            if name in facts:
                found[name] = None if facts[name] is None else tuple(facts[name])
        if facts.get("aggregation") is not None and "share" in facts:
            found["aggregation"] = facts["aggregation"]
        if "target" in facts:
            found["target"] = load_object(facts["target"], "target") if ":" in facts["target"] else facts["target"]
    evidence = replace(run.evidence, **found)
    for leaf in leaves(scores):
        difference = first_difference(leaf.provenance, provenance(evidence, leaf.criterion))
        if difference is not None:
            raise ArtifactError(
                f"{run.score_path(leaf.criterion)}: later rounds score again, and these were made otherwise ({difference}); "
                "score again with --overwrite, or prune with --schedule one-shot"
            )
    return evidence
