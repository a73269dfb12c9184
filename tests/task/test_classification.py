"""Targets and divergences of classes against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prunekit.errors import UsageError
from prunekit.task import Classification, Regression, get_task, guess_task

OUT = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 4.0]])
LABELS = torch.tensor([2, 2])
TASK = Classification()


def test_margin_is_true_less_largest_other() -> None:
    assert TASK.get_target("margin")(OUT, LABELS).tolist() == [[-1.0], [4.0]]


def test_loss_is_cross_entropy_and_log_prob_its_negative() -> None:
    expected = F.cross_entropy(OUT, LABELS, reduction="none")[:, None]
    torch.testing.assert_close(TASK.get_target("loss")(OUT, LABELS), expected)
    torch.testing.assert_close(TASK.get_target("log_prob")(OUT, LABELS), -expected)


def test_any_mean_loss_becomes_a_target() -> None:
    torch.testing.assert_close(get_task("regression", F.mse_loss).get_target("loss")(OUT, OUT + 2), torch.full((2, 1), 4.0))
    torch.testing.assert_close(
        get_task(None, F.cross_entropy).get_target("loss")(OUT, LABELS), TASK.get_target("loss")(OUT, LABELS)
    )


def test_unknown_target_is_refused_and_one_of_other_tasks_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="did you mean margin"):
        TASK.get_target("margins")
    with pytest.raises(UsageError, match="regression; it has outputs, log_prob, loss"):
        Regression().get_target("margin")


def test_divergence_counts_no_class_that_the_reference_rules_out() -> None:
    torch.manual_seed(0)
    reference, out = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    for ruled_out in (reference, out):
        ruled_out[..., 1] = -torch.inf
    out.requires_grad_()
    found = TASK.divergence(out, (TASK.reference(reference), None))
    kept = [0, 2, 3]
    p, q = (F.softmax(t[..., kept], -1) for t in (reference, out))
    torch.testing.assert_close(found[:, 0], (p * (p / q).log()).sum(-1).mean(1))
    assert torch.autograd.grad(found.sum(), out)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_labels_that_are_true_and_false_ask_for_the_task(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"labels are true and false; name the task \(task: binary or multi_label\)"):
        guess_task(torch.zeros(4, 3), torch.ones(shape, dtype=torch.bool), given_loss=False)
