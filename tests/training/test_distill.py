"""Distillation's loss and gradient against formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.training import Distillation


@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_equals_the_formula(temperature: float, weight: float) -> None:
    """dL/dz = (1 - w) (p - onehot) / n + w T (softmax(z / T) - softmax(v / T)) / n, v the teacher's logits."""
    torch.manual_seed(0)
    teacher = nn.Linear(5, 4).double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 4, (7,))
    z = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    Distillation(teacher, temperature, weight)(F.cross_entropy(z, y), z, x).backward()
    p, v, t = z.detach().softmax(1), teacher(x).detach(), temperature
    hard = p - F.one_hot(y, 4)
    soft = t * ((z.detach() / t).softmax(1) - (v / t).softmax(1))
    torch.testing.assert_close(z.grad, ((1 - weight) * hard + weight * soft) / 7)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_value_on_sequences_is_the_mean_over_positions() -> None:
    """``T² Σ q log(q / p)`` per position."""
    torch.manual_seed(0)
    teacher = nn.Linear(5, 3).double()
    x, z = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    p, q = (z / 2).softmax(-1), (teacher(x) / 2).softmax(-1)
    expected = 0.5 * 10.0 + 0.5 * 4 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(Distillation(teacher, 2.0, 0.5)(torch.tensor(10.0, dtype=torch.float64), z, x), expected)


def test_teacher_is_asked_in_evaluation_mode_and_left_as_it_was() -> None:
    teacher = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.9)).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    x, z = torch.randn(7, 5), torch.randn(7, 4)
    distill = Distillation(teacher)
    assert torch.equal(distill(torch.zeros(()), z, x), distill(torch.zeros(()), z, x))
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
