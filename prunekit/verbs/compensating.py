"""Weights of a run that make up for removed ones: computed from its training samples, judged on its scoring samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prunekit import checkpoint
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
