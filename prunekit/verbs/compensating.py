"""Weights of a run that make up for removed ones: computed from its training samples, judged on its scoring samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from prunekit.apply import check_made_for, compensate, layerwise, prune
from prunekit.apply.sums import SUMS
from prunekit.batch import Inputs
from prunekit.data import Samples
from prunekit.plan import Plan
from prunekit.steps import cut
from prunekit.steps.by_schedule import Start
from prunekit.verbs.run_folder import Run

SAMPLES = 1000
"""Training samples that compensation is computed from, at most: as many as refining learns from unless told."""


def calibration(run: Run) -> tuple[Samples, Samples]:
    """What ``prunekit.apply.compensate`` looks at: samples to compute from, and samples to judge on."""
    return run.batches("train", SAMPLES), run.evidence.samples()


def pruned_as_asked(run: Run, plan: Plan, example: Inputs | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The plan's pruned model, compensated if the plan asks for that, and what its manifest says of that.

    A plan for some classes is compensated on their samples.
    """
    request = plan.provenance.get("request", {})
    if not request.get("compensate"):
        return prune(run.model, plan, example), {}
    check_made_for(plan, run.model)
    facts: dict[str, Any] = {}
    return cut(compensated(_own(run, plan), facts, run.model, plan), plan, example), facts


def compensated(run: Run, facts: dict[str, Any], model: nn.Module, plan: Plan) -> nn.Module:
    """A dense-shaped model that does what the plan's compensated one does; ``facts`` take what its manifest says of that.

    Args:
        run: restricted to the plan's classes, where it is for some.
    """
    learn, accept = calibration(run)
    place = next(model.parameters()).device
    with _noting() as said, run.lent(model):
        found = compensate(model, plan, learn, accept=accept, seed=run.recipe.seed, task=run.task)
    facts.update(said)
    return found.to(place)


@contextmanager
def _noting() -> Iterator[dict[str, Any]]:
    """Inside, what compensation warns of is kept from the user, and is in the facts afterwards."""
    facts: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield facts
    notes = [str(w.message) for w in said if str(w.message).startswith("compensate: ")]
    if notes:
        facts["compensation_note"] = notes[0].removeprefix("compensate: ")


def start_of(run: Run, plan: Plan, facts: dict[str, Any]) -> Start | None:
    """What fine-tuning begins from where the plan asks for compensated weights; None where it does not."""
    if not plan.provenance.get("request", {}).get("compensate"):
        return None
    return partial(compensated, _own(run, plan), facts)


def _own(run: Run, plan: Plan) -> Run:
    """The run, restricted to the plan's classes where it is for some."""
    classes = plan.provenance.get("request", {}).get("classes")
    return run.restricted(classes) if classes else run


def compensation_request(run: Run) -> dict[str, Any]:
    """What decides compensated weights, for reuse."""
    scoring = run.evidence.samples().digest()
    return {"train": run.splits["train"].digest(), "samples": SAMPLES, "scoring": scoring, "sums": SUMS}


def compensator(run: Run, layers: bool, seed: int) -> tuple[Callable[[nn.Module, Plan], nn.Module], dict[str, Any]]:
    """``(model, plan)`` -> compensated model, and what decides it.

    Args:
        layers: by every layer's outputs alone, computed from the scoring samples (``prunekit.apply.layerwise``).
    """
    if layers:
        facts = {"calibration": run.splits["scoring"].digest(), "sums": SUMS}
        return partial(layerwise, batches=run.evidence.samples(), task=run.task), facts
    learn, accept = calibration(run)
    return partial(compensate, batches=learn, accept=accept, seed=seed, task=run.task), {"compensate": compensation_request(run)}
