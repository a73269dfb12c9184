"""What a criterion can be tried on: a small recorded net, or a mixture of experts in blocks for those that score units."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from prunekit.criteria import CRITERIA
from prunekit.trajectory import Trajectory
from tests.conftest import imported, tiny_data
from tests.transformer_models import built

Run = tuple[nn.Module, Trajectory]


def material(criterion: str, tiny_run: Run, samples: int) -> tuple[nn.Module, Trajectory, list[Any], dict[str, Any]]:
    """Model, path, batches, and options of ``score``."""
    if CRITERIA[criterion].structure is None:
        return *tiny_run, [tiny_data(samples, torch.float64)], {}
    model, trajectory = mixture()
    return model, trajectory, [text(samples)], {"task": "causal_lm", "ignore": ["*embed*", "lm_head*"]}


@cache
def mixture() -> Run:
    model, _ = built("mixtral")
    return model, imported(model)


def text(samples: int, length: int = 6) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(3, 40, (samples, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids}, ids
