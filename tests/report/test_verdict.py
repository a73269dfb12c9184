"""The verdict on a pruned model: a line whose figures are those of the artifacts, and errors that are those of paired counts."""

from __future__ import annotations

import pytest
import torch

from prunekit.measure import Lost
from prunekit.report.measures import Shown
from prunekit.report.verdict import Verdict
from prunekit.task import Classification
from prunekit.task.evaluation import Evaluation, compared

ACCURACY = Shown("accuracy", "higher", "%", False)
LOST: Lost = {"samples": 270, "dense": 0.978, "pruned": 0.963, "lost": 1.5, "standard_error": 0.61}


def evaluation(right: torch.Tensor) -> Evaluation:
    return Evaluation((Classification().measures[0],), {"accuracy": right.double()[:, None]}, len(right))


def test_the_error_of_lost_accuracy_is_that_of_discordant_pairs() -> None:
    dense = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.9
    pruned = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.8
    b, c, n = int((dense & ~pruned).sum()), int((pruned & ~dense).sum()), 60
    found = compared(evaluation(pruned), evaluation(dense))
    assert found["lost"] == pytest.approx(100 * (b - c) / n)
    assert found["standard_error"] == pytest.approx(100 * ((b + c - (b - c) ** 2 / n) / (n * (n - 1))) ** 0.5)


def test_one_sample_has_no_error() -> None:
    assert "standard_error" not in compared(evaluation(torch.tensor([True])), evaluation(torch.tensor([True])))


def test_what_stays_what_was_lost_and_what_was_asked() -> None:
    found = Verdict(
        kept=16980, total=56394, measure=ACCURACY, lost={"validation": LOST, "test": {"pruned": 0.961}},
        asked=("max_accuracy_drop", 1.0, 1.5),
    )  # fmt: skip
    assert found.text() == (
        "16,980 of 56,394 parameters stay; validation accuracy 97.8 → 96.3 (1.5 ± 0.6 points lost, asked 1); test accuracy 96.1"
    )


def test_a_measure_of_which_less_is_better_and_that_was_gained() -> None:
    measure = Shown("rmse", "lower", "", False)
    lost: Lost = {"dense": 0.5, "pruned": 0.48, "lost": -0.02}
    found = Verdict(kept=1, total=2, measure=measure, lost={"validation": lost}, classes=[3, 5], planned=True)
    assert found.text() == "1 of 2 parameters would stay; validation RMSE ↓ on classes 3, 5 0.5 → 0.48 (0.02 gained)"


@pytest.mark.parametrize(
    ("name", "said"), [("max_params", "stay (asked 9)"), ("max_macs", "; 8 MACs a sample (asked 9)"), ("max_bytes", "; 8 bytes")]
)
def test_budgets_say_what_was_asked(name: str, said: str) -> None:
    assert said in Verdict(kept=1, total=2, measure=ACCURACY, asked=(name, 9, 8)).text()
