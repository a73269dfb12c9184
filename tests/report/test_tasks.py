"""Accounts, explanations, tables and pictures of tasks other than one class a sample: they add up, and say what they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit import masked
from prunekit.batch import call, take, taken
from prunekit.data import Samples
from prunekit.explain import (
    RemovalEffect,
    Training,
    View,
    account,
    dense_reconstruction,
    explain_diff,
    explain_part,
    explain_removal,
    explain_removals,
    explain_sample,
    explain_training_sample,
    find_part,
    timeline,
)
from prunekit.kernel import ModelFunction
from prunekit.report import accuracy_tables, comparison_figure, sensitivity_figure, write_explanation
from prunekit.report.measures import by_name, deciding, shown
from prunekit.report.terminal.comparing import show_comparison, show_sensitivity
from prunekit.report.terminal.explaining import show_explanation
from prunekit.report.terminal.pruning import _budget
from prunekit.report.timeline import layer_figures
from prunekit.search.compare import Candidates, compare
from prunekit.search.sensitivity import sensitivity
from prunekit.task import get_task
from prunekit.task.evaluation import References, evaluate, measures_told
from tests.report.tasks import MADE, Case, case
from tests.structure_models import random_scores

VALUED = ("regression", "token_classification")
KL = {"regression": "mean squared distance", "token_classification": "KL", "binary": "KL"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: case(name, tmp_path_factory.mktemp(name) / "t") for name in MADE}


def viewed(made: Case, samples: int | None = None) -> View:
    x, y = made.test if samples is None else taken(made.test, range(samples))
    return View.of(made.model, made.trajectory, x, y, task=made.task, nodes=2)


def training_of(made: Case) -> Training:
    return Training(lambda indices: taken(made.training, indices))


def value(made: Case, view: View, state: torch.Tensor) -> float:
    return float((view.values(state).double() * view.own).sum())


def shows(result: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the terminal and the page say."""
    told = {**result, "split": "test", "made_from": {"trajectory": "t"}, "cost": {"seconds": 0.0}, "path": "page"}
    json.dumps(told)
    write_explanation(folder / "page.html", told, {})
    capsys.readouterr()
    show_explanation(told)
    return capsys.readouterr().out + (folder / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_layer_and_its_training_samples(
    name: str, cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cases[name]
    view = viewed(made)
    parts = {
        layer: find_part("layer", layer, "", made.trajectory.layout, made.model, lambda: made.test[0])
        for layer, _ in made.model.named_children()
    }
    found = {layer: explain_part(view, part, training_of(made), [made.path]) for layer, part in parts.items()}
    change = value(made, view, made.trajectory.state(-1)) - value(made, view, made.trajectory.state(0))
    assert sum(f["contribution"]["both"] for f in found.values()) == pytest.approx(change, rel=1e-2, abs=1e-4)
    for one in found.values():
        got = one["contribution"]
        assert one["training"]["sum"] + one["training"]["momentum"] == pytest.approx(got["kernel"], rel=1e-6, abs=1e-9)
        assert ("task" in one) == (name in VALUED)
    one = found[made.layer]
    text = shows(one, tmp_path, capsys)
    if name in VALUED:
        assert one["note"] in text
        assert "right answer" not in text
    pruned = [f["pruning"][0] for f in found.values()]
    whole = value(made, view, made.path.end) - value(made, view, made.trajectory.state(-1))
    assert [p["whole_change"] for p in pruned] == pytest.approx([whole] * len(pruned))
    assert sum(p["change"] for p in pruned) == pytest.approx(whole, rel=1e-2, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_sample_and_a_training_sample(
    name: str, cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cases[name]
    view = viewed(made, 1)
    found = explain_sample(view, 0, "test", training_of(made), [made.path])
    with torch.no_grad():
        out = made.task.outputs(call(made.model, view.x))
    expected: Any = {
        "regression": lambda: pytest.approx(out[0].tolist()),
        "token_classification": lambda: out[0].argmax(-1).tolist(),
        "binary": lambda: int(out[0, 0] > 0),
    }[name]()
    assert found["answer"] == expected
    assert found["label"] == take(made.test[1], slice(0, 1))[0].tolist()
    got = found["contribution"]
    assert got["model_at_start"] + got["both"] == pytest.approx(got["model"], abs=0.02)
    layers = sum(p["kernel"] + p["regularisation"] for row in found["layers"]["rows"] for p in row["phases"])
    assert layers == pytest.approx(got["both"], abs=1e-9)
    assert found["training"]["sum"] == pytest.approx(got["kernel"], rel=1e-6, abs=1e-9)
    shows(found, tmp_path, capsys)
    given = explain_training_sample(viewed(made), 3, training_of(made), [made.path])
    assert 1 <= given["contribution"]["rank"] <= 24
    assert sum(given["steps"]["kernel"]) == pytest.approx(given["contribution"]["both"], abs=1e-9)
    shows(given, tmp_path, capsys)


@pytest.mark.slow
def test_outputs_are_told_one_by_one_only_where_that_says_something(cases: dict[str, Case]) -> None:
    rows = {}
    for name in MADE:
        made = cases[name]
        layer = find_part("layer", made.layer, "", made.trajectory.layout, made.model, lambda: None)
        rows[name] = [row["class"] for row in explain_part(viewed(made), layer)["classes"]]
    assert sorted(rows["regression"]) == sorted(rows["binary"]) == [0, 1]
    assert rows["token_classification"] == []


@pytest.mark.parametrize("name", MADE)
def test_the_timeline_adds_up(name: str, cases: dict[str, Case]) -> None:
    made = cases[name]
    view = viewed(made)
    found = timeline(view)
    change = value(made, view, made.trajectory.state(-1)) - value(made, view, made.trajectory.state(0))
    assert found.layers["change"] == pytest.approx(change)
    assert abs(found.layers["residual"]) < 0.02 * abs(change) + 1e-3
    assert (found.samples is None) == (name in VALUED)
    assert (found.quantity is not None) == (name in VALUED)
    assert layer_figures(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_an_account_says_null_where_there_are_no_classes(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    made = cases[name]
    x, y = made.test
    function = ModelFunction(made.model, made.trajectory.layout, made.trajectory.fixed, made.task.target, task=made.task)
    options: Any = {"rule": "midpoint", "nodes": None, "tolerance": 1e-4, "stride": 1}
    dense = dense_reconstruction(function, made.trajectory, x, y, tmp_path / "r.safetensors", **options)
    found = account(function, made.trajectory, dense, made.path.end, made.path.keep, x, y, tolerance=1e-4, stride=1)
    assert found["samples"] == 9
    for part in ("dense", "pruned"):
        assert found[part]["mean_error"] < 1e-3
    for part in ("dense", "pruned", "masked_machine"):
        assert (found[part]["argmax_agreement"] is None) == (name in VALUED)
    assert (found["masked_machine"]["kl_to_pruned"] is None) == (name in VALUED)
    if name == "binary":
        assert found["dense"]["argmax_agreement"] == 1
    again = dense_reconstruction(function, made.trajectory, x, y, tmp_path / "r.safetensors", **options)
    assert torch.equal(again.rebuilt, dense.rebuilt)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_removal_adds_up_to_the_tasks_divergence(
    name: str, cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cases[name]
    damage = RemovalEffect(made.model, made.trajectory, *made.test, task=made.task)
    found = explain_removal(damage, "p", made.plan, range(9))
    references = References(made.model, Samples.held([made.test]), made.task)
    figures = evaluate(masked(made.model, made.plan), Samples.held([made.test]), made.task, references).figures()
    if name == "regression":
        assert found["after"]["divergence"] == pytest.approx(figures["distance"] ** 2)
    if name == "binary":
        assert found["after"]["divergence"] == pytest.approx(figures["kl"])
    assert found["after"]["blame"] + found["after"]["residual"] == pytest.approx(found["after"]["divergence"])
    assert sum(row["blame"] for row in found["after"]["layers"]) == pytest.approx(found["after"]["blame"])
    assert ("classes" in found["after"]) == (name not in VALUED)
    assert found["units"]
    assert KL[name] in shows(found, tmp_path, capsys)
    other = case(name, tmp_path / "t", "2:4" if name != "token_classification" else "unstructured").plan
    two = explain_removals(damage, ("a", made.plan), ("b", other), range(9))
    assert KL[name] in shows(two, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUED)
def test_a_diff_blames_groups_for_the_distance(
    name: str, cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cases[name]
    x, y = made.test
    found = explain_diff(made.model, made.trajectory, made.path, made.plan, x, y, limit=4, task=made.task)
    assert found["changed"] == {"all": 9, "shown": 4}
    with torch.no_grad():
        dense, pruned = (made.task.outputs(call(m, x)) for m in (made.model, masked(made.model, made.plan)))
        each = made.task.divergence(pruned, (made.task.reference(dense), y))[:, 0]
    assert [row["index"] for row in found["changes"]] == each.argsort(descending=True)[:4].tolist()
    for row in found["changes"]:
        assert -row["margin_pruned"] == pytest.approx(float(each[row["index"]]))
        assert row["pruning"] == pytest.approx(float(each[row["index"]]))
        assert abs(row["residual"]) < 0.02 * row["pruning"]
    mean = sum(row["pruning"] + row["residual"] for row in found["changes"]) / 4
    assert sum(group["blame"] for group in found["groups"]) == pytest.approx(mean)
    first = made.task.deciding
    assert found["figures"][first.name]["dense"] == pytest.approx(
        evaluate(made.model, Samples.held([made.test]), made.task).figures()[first.name]
    )
    text = shows(found, tmp_path, capsys)
    assert found["note"] in text
    assert "right to wrong" not in text


def test_a_diff_of_yes_and_no_is_one_of_classes(
    cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cases["binary"]
    x, y = made.test
    found = explain_diff(made.model, made.trajectory, made.path, made.plan, x, y, limit=9, task=made.task)
    with torch.no_grad():
        dense, pruned = (made.task.outputs(call(m, x))[:, 0] for m in (made.model, masked(made.model, made.plan)))
    changed = ((dense > 0) != (pruned > 0)).nonzero()[:, 0].tolist()
    assert changed
    assert sorted(row["index"] for row in found["changes"]) == changed
    for row in found["changes"]:
        assert row["margin_dense"] == pytest.approx(float(dense[row["index"]].abs()))
        assert row["margin_pruned"] == pytest.approx(-float(pruned[row["index"]].abs()))
    shows(found, tmp_path, capsys)


@pytest.mark.parametrize("name", MADE)
def test_comparisons_are_shown_by_the_first_measure(
    name: str, cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cases[name]
    scores = {f"random {seed}": random_scores(made.model, seed) for seed in (1, 2)}
    grid: Any = {"structures": ["unstructured"], "allocations": ["global"], "sparsities": [0.3, 0.6]}
    found = compare(made.model, scores, [made.test], task=made.task, **grid)
    measure = deciding(found.measures)
    assert measure.name == made.task.deciding.name
    (table,) = accuracy_tables(found)
    for place, sparsity in enumerate(table["sparsities"]):
        best = next(cells[place] for cells in table["rows"].values() if cells[place]["best"])
        expected = found.best("unstructured", sparsity, made.task)
        assert expected is not None
        assert best["criterion"] == expected["criterion"]
    assert comparison_figure(found).axes[0].get_ylabel() == f"validation {measure.axis}"
    show_comparison((found, False))
    assert f"validation {measure.title}" in capsys.readouterr().out
    candidates = Candidates(made.model, scores, [made.test], ["unstructured"], task=made.task)
    result = sensitivity(candidates, "unstructured", "random 1", [0.5])
    assert sensitivity_figure(result).axes
    show_sensitivity((result, tmp_path / "s.json", False))
    assert measure.title in capsys.readouterr().out


def test_names_and_directions_of_measures() -> None:
    told = {name: shown(measures_told(get_task(name))) for name in ("classification", "regression", "causal_lm", "segmentation")}
    assert [m.label for m in told["classification"]] == ["accuracy", "agreement with dense", "KL to dense (nats)"]
    assert [m.axis for m in told["regression"]] == ["RMSE ↓", "R² ↑", "distance to dense ↓"]
    assert [m.title for m in told["causal_lm"]][:2] == ["perplexity ↓", "bits a token ↓"]
    assert told["segmentation"][0].axis == "mean IoU (%)"
    own = [{"name": "of_their_own", "better": "lower", "unit": "", "close": False}]
    assert by_name("of_their_own", own).title == "of_their_own ↓"
    assert by_name("of_their_own", None).title == "of_their_own"
    assert by_name("rmse", None).sign == -1  # of an older artifact, which does not tell


def test_a_budget_says_what_it_loses_of_which_measure() -> None:
    told = {"measures": measures_told(get_task("regression"))}
    lost = {**told, "budget": {"max_drop": 0.5}, "measure": "rmse", "reached": 0.12, "standard_error": 0.05}
    assert _budget(lost) == "--max-drop 0.5: loses 0.12 ± 0.05 of RMSE on validation data"
    told = {"measures": measures_told(get_task("classification"))}
    points = {**told, "budget": {"max_accuracy_drop": 1}, "reached": 0.5, "standard_error": 0.2}
    assert _budget(points) == "--max-accuracy-drop 1: loses 0.5 ± 0.2 points of accuracy on validation data"
    assert _budget({"budget": {"max_macs": 4000}, "reached": 3900}) == "--max-macs 4,000: the plan comes to 3,900"
