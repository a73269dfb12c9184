"""How much each layer costs when it alone is pruned: a layer × sparsity table on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.apply import masked
from prunekit.criteria import Scores
from prunekit.errors import UsageError
from prunekit.plan import GROUPED, STRUCTURES, Plan
from prunekit.progress import track
from prunekit.search.compare import Candidates
from prunekit.task.evaluation import measures_told


def sensitivity(candidates: Candidates, structure: str, criterion: str, sparsities: Sequence[float]) -> dict[str, Any]:
    """Measures the model with one layer pruned at a time, the others whole.

    Args:
        candidates: model, scores and the batches to measure on.
        structure: a layer is a parameter in an unstructured plan, and a group of units otherwise.
        criterion: decides what goes inside the layer.
        sparsities: shares to remove of the layer's weights (units), in [0, 1).

    Returns:
        ``dense``: figures; ``measures``: what they are; ``cells``: one a layer and sparsity, with ``layer``, ``sparsity``,
        ``removed`` (weights or units) and figures, closeness to the dense model among them.

    Raises:
        UsageError: a pattern, which has no sparsity to vary.
    """
    if structure != "unstructured" and structure not in GROUPED:
        raise UsageError(f"sensitivity: {structure!r} is a pattern; take one of {', '.join(STRUCTURES)}")
    whole = candidates.plan(structure, criterion, "uniform", 0.0)
    importance = _importance(candidates.scores[criterion], whole, candidates)
    grid = [(layer, sparsity) for layer in importance for sparsity in sparsities]
    cells = []
    for layer, sparsity in track(grid, "sensitivity (cells)", len(grid)):
        values = importance[layer]
        remove = min(round(sparsity * values.numel()), values.numel() - 1)
        keep = torch.ones(values.numel(), dtype=torch.bool)
        keep[torch.sort(values.flatten(), stable=True).indices[:remove]] = False
        plan = whole.edited({layer: keep.view(values.shape)})
        figures = candidates.measured(masked(candidates.model, plan))
        cells.append({"layer": layer, "sparsity": sparsity, "removed": remove, **figures})
    return {"dense": candidates.dense, "measures": measures_told(candidates.task), "cells": cells}


def _importance(scores: Scores, whole: Plan, candidates: Candidates) -> Mapping[str, Tensor]:
    if not whole.index:
        return {name: scores.importance[name] for name in whole.keep}
    groups = candidates.groups[whole.structure]
    return scores.groups({group.name: group.members for group in groups if group.name in whole.keep})
