"""Weights of a run that make up for removed ones: computed from its training samples, judged on its scoring samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.apply import compensate, layerwise
from prunekit.verbs.run_folder import Run

SAMPLES = 1000
"""Training samples that compensation is computed from, at most: as many as refining learns from unless told."""

Batches = Sequence[tuple[Tensor, Tensor]]


def calibration(run: Run) -> tuple[Batches, Batches]:
    """What ``prunekit.apply.compensate`` looks at: samples to compute from, and samples to judge on."""
    return run.batches("train", SAMPLES), [run.evidence.samples()]


def compensation_request(run: Run) -> dict[str, Any]:
    """What decides compensated weights, for reuse."""
    scoring = checkpoint.digest(dict(zip("xy", run.evidence.samples(), strict=True)))
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
        return partial(layerwise, batches=[run.evidence.samples()]), facts
    learn, accept = calibration(run)
    return partial(compensate, batches=learn, accept=accept, seed=seed), {"compensate": compensation_request(run)}
