"""BatchNorm statistics measured anew are plain averages over the batches, and nothing else moves."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.training import recalibrate


def test_statistics_are_averages_over_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2), nn.BatchNorm1d(2)
    )
    model.double()
    batches = [(torch.randn(n, 1, 4, 4, dtype=torch.float64), torch.zeros(n)) for n in (8, 8, 5)]
    weights = {k: v.clone() for k, v in model.named_parameters()}
    model.train()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    assert recalibrate(model, batches) == 2
    assert [m.training for m in model.modules()] == modes
    assert [model[1].momentum, model[6].momentum] == [0.1, 0.1]
    assert all(torch.equal(weights[k], v) for k, v in model.named_parameters())
    with torch.no_grad():
        first = [model[0](x) for x, _ in batches]
        mean = torch.stack([z.mean((0, 2, 3)) for z in first]).mean(0)
        variance = torch.stack([z.transpose(0, 1).flatten(1).var(1) for z in first]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    with torch.no_grad():  # the second norm sees what the first gives when it normalises by the batch, without dropout
        hidden = [
            model[5](
                torch.relu(
                    (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
                ).flatten(1)
            )
            for z in first
        ]
    torch.testing.assert_close(model[6].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))


def test_without_batch_norm_nothing_is_done() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def never() -> object:
        raise AssertionError("no batch is needed")
        yield

    assert recalibrate(model, never()) == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
