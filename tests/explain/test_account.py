"""The kernel's account of a pruned model counts the weights that stay and that pruning itself gave another value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.explain import account, dense_reconstruction
from prunekit.kernel import ModelFunction
from tests.conftest import record, tiny_data


def test_only_weights_that_stay_with_another_value_are_set_anew(tmp_path: Path) -> None:
    """Not what went, not what is 0 for now and comes back later, and no statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).double()
    trajectory = record(tmp_path / "t", model, torch.optim.AdamW(model.parameters(), lr=0.05), steps=8)
    x, y = tiny_data(20, torch.float64, seed=3)
    layout, last = trajectory.layout, trajectory.state(-1)
    function = ModelFunction(model, layout, trajectory.fixed, "outputs")
    options: Any = {"rule": "midpoint", "nodes": None, "tolerance": 1e-4, "stride": 1}
    dense = dense_reconstruction(function, trajectory, x, y, tmp_path / "r.safetensors", **options)
    places = {entry.name: entry.offset for entry in layout}
    mask, end = torch.ones_like(last, dtype=torch.bool), last.clone()
    mask[:5], end[:5] = False, 0  # gone
    end[5:8] = 0  # gone for now
    end[places["2.running_mean"]] += 1
    for anew in (0, 3):
        end[10 : 10 + anew] += 0.1
        found = account(function, trajectory, dense, end, mask, x, y, tolerance=1e-4, stride=1)
        assert found["pruned"].get("new_values", 0) == anew
