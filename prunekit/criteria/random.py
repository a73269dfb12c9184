"""Random: uniform draws from the seed; the control that every criterion has to beat."""

from __future__ import annotations

import torch

from prunekit.criteria.evidence import Criterion, Evidence, Found


def _random(evidence: Evidence) -> Found:
    generator = torch.Generator().manual_seed(evidence.seed)
    shapes = {entry.name: entry.shape for entry in evidence.layout}
    return Found({name: torch.rand(shapes[name], generator=generator) for name in evidence.prunable})


CRITERION = Criterion(_random, "uniform draws from the seed", group="draw")
