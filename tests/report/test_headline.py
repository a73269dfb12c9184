"""The headline of a pruned model: ratios, what was lost with its error, the speed-up with its interval, as eval.json has them."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit.explain import EvaluationRecord
from prunekit.report.headline import headline
from prunekit.report.sections import models
from prunekit.report.size_plot import size_figure


def evaluation(**changes: Any) -> EvaluationRecord:
    """3 of 4 parameters removed; 90.0 % to 87.5 % on test data, 2.5 points; 2 times as fast at the last batch size."""
    sizes = {"parameters": 4000, "nonzero": 4000, "macs": 8000, "bytes": 16000}
    small = {"parameters": 1000, "nonzero": 1000, "macs": 8000, "bytes": 4000, "accuracy": 0.875, "agreement": 0.9, "kl": 0.1}
    speed = {"dense_ms": 4.0, "pruned_ms": 2.0, "speedup": 2.0, "low": 1.9, "high": 2.1, "rounds": 40}
    found: dict[str, Any] = {
        "made_from": {
            "weights": "w", "trajectory": "t", "criterion": "magnitude", "allocation": "global", "structure": "channels"
        },
        "test_samples": 200, "sparsity": {"prunable": 0.8, "all": 0.75}, "dense": {**sizes, "accuracy": 0.9}, "pruned": small,
        "layers": {"a": {"total": 4000, "kept": 1000}},
        "latency": {"machine": "here", "batches": {"1": {"dense_ms": 1.0, "pruned_ms": 1.0}, "64": speed}},
        "lost": {"test": {"samples": 200, "dense": 0.9, "pruned": 0.875, "lost": 2.5, "standard_error": 1.25}},
        "kernel": None, "cost": {"seconds": 1.0, "peak_mb": 1.0},
    }  # fmt: skip
    return EvaluationRecord(**{**found, **changes})


def test_ratio_loss_with_its_error_and_speed_up_with_its_interval() -> None:
    smaller, lost, faster = headline(evaluation()).figures
    assert (smaller.heading, smaller.figure, smaller.words) == ("smaller", "4.00×", "1,000 of 4,000 parameters stay")
    assert (lost.heading, lost.figure) == ("points lost", "2.5 ± 1.2")
    assert lost.words == "test accuracy: 90.0 → 87.5, 200 samples"
    assert (faster.heading, faster.figure) == ("faster", "2.00×")
    assert "95 % interval 1.90–2.10×, batch 64: 2.00 ms instead of 4.00" in faster.words


def test_zeros_in_a_file_as_large_are_not_called_smaller() -> None:
    found = evaluation()
    found = evaluation(pruned={**found.pruned, "bytes": 16100})
    assert headline(found).figures[0].heading == "fewer weights"
    assert "a file as large as before" in headline(found).figures[0].words


@pytest.mark.parametrize(
    ("low", "high", "said"), [(1.01, 2.5, "faster"), (0.9, 1.1, "as fast, within the error"), (0.5, 0.9, "slower")]
)
def test_faster_is_said_where_the_interval_says_it(low: float, high: float, said: str) -> None:
    times = {"dense_ms": 1.0, "pruned_ms": 1.0, "speedup": (low + high) / 2, "low": low, "high": high, "rounds": 40}
    assert headline(evaluation(latency={"machine": "here", "batches": {"8": times}})).figures[2].heading == said


def test_what_is_gained_and_another_unit() -> None:
    measures = [{"name": "rmse", "better": "lower", "unit": "", "close": False}]
    sizes = {"parameters": 2, "nonzero": 2, "macs": 2, "bytes": 2}
    lost = {"test": {"dense": 0.5, "pruned": 0.48, "lost": -0.02, "standard_error": 0.01}}
    found = evaluation(
        measures=measures, dense={**sizes, "rmse": 0.5}, pruned={**sizes, "rmse": 0.48}, lost=lost,
        sparsity={"prunable": 0, "all": 0},
    )  # fmt: skip
    gained = headline(found).figures[1]
    assert (gained.heading, gained.figure, gained.words) == ("gained", "0.02 ± 0.01", "test RMSE: 0.5 → 0.48")


def test_an_older_evaluation_says_what_it_does_not_know() -> None:
    old = evaluation(lost=None, latency={"machine": "here", "batches": {"64": {"dense_ms": 4.0, "pruned_ms": 2.0}}})
    _, lost, faster = headline(old).figures
    assert (lost.figure, faster.figure) == ("90.0 → 87.5", "not known")


def test_nothing_left_has_no_ratio() -> None:
    assert headline(evaluation(sparsity={"prunable": 1.0, "all": 1.0})).figures[0].figure == "all gone"


def test_the_picture_has_a_point_with_its_error_a_model_and_the_dense_line() -> None:
    figure = size_figure({"a": {"one": evaluation(), "old": evaluation(lost=None, sparsity={"prunable": 0.5, "all": 0.5})}})
    (panel,) = figure.axes
    lines = {line.get_label(): line for line in panel.lines}
    assert list(lines["dense model"].get_ydata()) == [90.0, 90.0]
    bars = {bar.get_label(): bar for bar in panel.containers}
    (x, y), segments = bars["one"].lines[0].get_xydata()[0], bars["one"].lines[2][0].get_segments()
    assert (x, y) == pytest.approx((25.0, 87.5))
    assert segments[0][:, 1] == pytest.approx([86.25, 88.75])
    assert tuple(bars["old"].lines[0].get_xydata()[0]) == pytest.approx((50.0, 87.5))
    assert not bars["old"].has_yerr


def test_runs_of_different_sizes_are_drawn_by_number_and_of_different_tasks_apart() -> None:
    measures = [{"name": "rmse", "better": "lower", "unit": "", "close": False}]
    sizes = {"parameters": 400, "nonzero": 400, "macs": 1, "bytes": 1, "rmse": 0.5}
    other = evaluation(measures=measures, dense=sizes, pruned=sizes, lost=None)
    above, below = size_figure({"a": {"one": evaluation()}, "b": {"one": other}, "none": {}}).axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("test accuracy (%)", "test RMSE ↓")
    assert above.get_xscale() == "log"
    assert above.containers[0].lines[0].get_xdata()[0] == 1000
    assert {text.get_text() for text in above.get_legend().get_texts()} == {"a", "a, dense"}


def test_ratios_of_the_table() -> None:
    heads = {column.head: column for column in models._columns([evaluation()])}
    found = evaluation()
    said = {head: column.pruned(found) for head, column in heads.items()}
    assert [c.beside for c in (said["parameters that stay"], said["bytes on disk"], said["theoretical MACs"])] == [
        "4.00× fewer", "4.00× fewer", "as many"
    ]  # fmt: skip
    assert (said["lost"].text, said["lost"].value) == ("2.5 ± 1.2", 2.5)
    assert said["ms, batch 64"].beside == "2.00× as fast (1.90–2.10)"
    assert heads["parameters that stay"].dense(found).text == "4,000"
    assert heads["KL to dense (nats)"].dense(found).text == ""


@pytest.mark.parametrize("name", ["prunable", "all"])
def test_a_share_outside_0_to_1_is_refused(name: str) -> None:
    evaluation().check()
    with pytest.raises(ValueError, match=rf"sparsity\.{name} is 1e\+308"):
        evaluation(sparsity={"prunable": 0.5, "all": 0.5, name: 1e308}).check()
