"""Weights of a run that make up for removed ones: computed from its training samples, judged on its scoring samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunekit.apply import compensate, layerwise, prune
from prunekit.batch import Inputs
from prunekit.data import Samples
from prunekit.plan import Plan
from prunekit.verbs.run_folder import Run

SAMPLES = 1000
"""Training samples that compensation is computed from, at most: as many as refining learns from unless told."""


def calibration(run: Run) -> tuple[Samples, Samples]:
    """What ``prunekit.apply.compensate`` looks at: samples to compute from, and samples to judge on."""
    return run.batches("train", SAMPLES), run.evidence.samples()


def pruned_as_asked(run: Run, plan: Plan, example: Inputs | None = None) -> tuple[nn.Module, str]:
    """The plan's pruned model, compensated if the plan asks for that, and what there is to say of it.

    A plan for some classes is compensated on their samples.
    """
    request = plan.provenance.get("request", {})
    if not request.get("compensate"):
        return prune(run.model, plan, example), ""
    learn, accept = calibration(run.restricted(request["classes"]) if request.get("classes") else run)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = prune(run.model, plan, example, calibration=learn, accept=accept, seed=run.recipe.seed, task=run.task)
    notes = [str(w.message) for w in said if str(w.message).startswith("compensate: ")]
    return model, notes[0].removeprefix("compensate: ") if notes else ""


def compensation_request(run: Run) -> dict[str, Any]:
    """What decides compensated weights, for reuse."""
    scoring = run.evidence.samples().digest()
    return {"train": run.splits["train"].digest(), "samples": SAMPLES, "scoring": scoring}


def compensator(
    run: Run, layers: bool, seed: int
) -> tuple[Callable[[nn.Module, Mapping[str, Tensor]], nn.Module], dict[str, Any]]:
    """``(model, masks)`` -> compensated model, and what decides it.

    Args:
        layers: by every layer's outputs alone, computed from the scoring samples (``prunekit.apply.layerwise``).
    """
    if layers:
        facts = {"calibration": run.splits["scoring"].digest()}
        return partial(layerwise, batches=run.evidence.samples(), task=run.task), facts
    learn, accept = calibration(run)
    return partial(compensate, batches=learn, accept=accept, seed=seed, task=run.task), {"compensate": compensation_request(run)}
