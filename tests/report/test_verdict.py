"""The verdict on a pruned model: a line whose figures are those of the artifacts, and errors that are those of paired counts."""

from __future__ import annotations

import pytest
import torch

from prunekit.measure import Lost, Speed
from prunekit.report.measures import Shown, three
from prunekit.report.verdict import Verdict
from prunekit.task import Classification
from prunekit.task.evaluation import Evaluation, compared

ACCURACY = Shown("accuracy", "higher", "%", False)
LOST: Lost = {"samples": 270, "dense": 0.978, "pruned": 0.963, "lost": 1.5, "standard_error": 0.61}


def evaluation(right: torch.Tensor) -> Evaluation:
    return Evaluation(
        (Classification().measures[0],),
        {"accuracy": torch.stack([right.double(), torch.ones(len(right)).double()], 1)},
        len(right),
    )


def test_the_error_of_lost_accuracy_is_that_of_discordant_pairs() -> None:
    dense = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.9
    pruned = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.8
    b, c, n = int((dense & ~pruned).sum()), int((pruned & ~dense).sum()), 60
    found = compared(evaluation(pruned), evaluation(dense))
    assert found["lost"] == pytest.approx(100 * (b - c) / n)
    assert found["standard_error"] == pytest.approx(100 * ((b + c - (b - c) ** 2 / n) / (n * (n - 1))) ** 0.5, rel=1e-5)


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


def speed(**changes: float) -> Speed:
    found: Speed = {"batch": 64, "dense_ms": 12.43, "pruned_ms": 10.72, "speedup": 1.16, "low": 1.14, "high": 1.18, "rounds": 40}
    return {**found, **changes}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("asked", "measured", "said"),
    [
        (None, speed(), "; 1.16× at batch 64 (10.7 ms, 1.14–1.18×); test accuracy 96.1"),
        (("max_latency_ms", 11.1, 10.9), speed(), "; 1.16× at batch 64 (10.9 ms, 1.14–1.18×; asked 11.1)"),
        (("speedup", 1.1, 1.16), speed(low=0.9), "; 1.16× at batch 64 (10.7 ms, 0.900–1.18×, a noisy machine; asked 1.1)"),
        (("speedup", 1.17, 1.16), speed(), "1.14–1.18×; asked 1.17, within the spread)"),
        (("speedup", 3, 1.16), speed(), "1.14–1.18×; asked 3, not reached)"),
        (("max_latency_ms", 10.6, 10.7), speed(), "; 1.16× at batch 64 (10.7 ms, 1.14–1.18×; asked 10.6, within the spread)"),
        (("max_latency_ms", 9, 10.7), speed(), "1.14–1.18×; asked 9, not reached)"),
    ],
)
def test_speed_has_its_interval_and_what_was_asked(asked: tuple[str, float, float] | None, measured: Speed, said: str) -> None:
    found = Verdict(
        kept=1, total=2, measure=ACCURACY, lost={"test": {"pruned": 0.961}}, asked=asked, speed=measured, why="memory"
    )
    assert said in found.text()
    assert found.text().endswith(". Fewer MACs, but hardly faster: memory")


@pytest.mark.parametrize(("figure", "said"), [(11.14, "11.1"), (0.1234, "0.123"), (123.4, "123"), (1239.6, "1,240"), (3, "3.00")])
def test_measured_figures_have_three_digits(figure: float, said: str) -> None:
    assert three(figure) == said
