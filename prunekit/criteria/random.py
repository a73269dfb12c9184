"""Random: uniform draws from the seed; the control that every criterion has to beat."""

from __future__ import annotations

import torch

from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence


def _random(evidence: Evidence) -> CriterionResult:
    generator = torch.Generator().manual_seed(evidence.seed)
    shapes = {entry.name: entry.shape for entry in evidence.layout}
    return CriterionResult({name: torch.rand(shapes[name], generator=generator) for name in evidence.prunable})


CRITERION = Criterion(_random, "uniform draws from the seed", spreads=True, group="draw")
