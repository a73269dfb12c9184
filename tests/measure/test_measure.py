"""Figures against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.measure import accuracy, agreement, kl, latencies, machine, sizes


def test_divergence_is_kl_from_the_reference() -> None:
    a, b = torch.randn(20, 5), torch.randn(20, 5)
    expected = F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction="batchmean")
    assert kl(a, b) == pytest.approx(float(expected), rel=1e-5)
    assert kl(a, a) == pytest.approx(0, abs=1e-12)


def test_accuracy_and_agreement_count() -> None:
    outputs = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    assert accuracy(outputs, torch.tensor([0, 1, 0, 0])) == 0.75
    assert agreement(outputs, -outputs) == 0


def test_sizes_of_known_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(3 * 16, 5))
    with torch.no_grad():
        model[0].weight[0] = 0
    found = sizes(model, torch.randn(1, 2, 4, 4))
    assert found == {"parameters": 54 + 245, "nonzero": 36 + 245, "macs": 16 * 54 + 240}


def test_latencies_name_the_machine_and_tell_models_apart() -> None:
    models = {"one": nn.Linear(4, 4), "many": nn.Sequential(*[nn.Linear(256, 256) for _ in range(30)])}
    x = torch.randn(2, 256)
    models["one"] = nn.Linear(256, 4)
    found = latencies(models, x)
    assert found["one"] < found["many"]
    assert "threads" in machine()
