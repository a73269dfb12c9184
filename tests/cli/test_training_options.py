"""Watching accuracies, ending early, dropping and augmenting batches, by recipe and command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunekit.data import Split, digits
from prunekit.measure import accuracy
from prunekit.models import digits_cnn
from prunekit.report.terminal.training import show_trained
from prunekit.training.record import TrainingRecord
from prunekit.trajectory import Trajectory, load_into
from tests.reference import predict

from .conftest import Cli

RECIPE = """
seed: 3
threads: 1
model: {{factory: "prunekit.models:digits_cnn", args: {{channels: [4, 4, 4]}}}}
data: {{factory: "prunekit.data:digits"}}
train: {{optimizer: {{name: sgd, lr: 0.2, momentum: 0.9}}, epochs: 4, batch_size: 256, {options}}}
"""


def write(folder: Path, options: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(options=options))
    return path


@pytest.mark.slow
def test_watched_accuracies_are_those_of_the_recorded_states(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", write(tmp_path, "watch: {every: 2}"), "--out", tmp_path / "run").code == 0
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    told = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run").out  # reused, from the record
    assert "98% right: training data never, validation data never" in told
    path, model = Trajectory(tmp_path / "run" / "trajectory"), digits_cnn((4, 4, 4))
    assert [row["epoch"] for row in record["accuracies"]] == [2, 4]
    for row in record["accuracies"]:
        load_into(model, path.model_state(row["epoch"] * 4), path.folder)
        for name in ("train", "validation"):
            split = Split(digits()[name])
            assert row[name] == pytest.approx(accuracy(*predict(model, split.batches(256))), abs=1e-6)


def test_the_epochs_of_memorising_and_generalising_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    seen = [(10, 0.5, 0.1), (20, 0.98, 0.97), (30, 0.97, 0.99), (40, 1.0, 1.0)]
    record = TrainingRecord(
        steps=40, coordinates=1, losses=[1.0], cost={"seconds": 1.0}, accuracy={"train": 1.0, "validation": 1.0},
        accuracies=[{"epoch": epoch, "train": a, "validation": b} for epoch, a, b in seen],
    )  # fmt: skip
    show_trained((record, False))
    assert "98% right: training data at epoch 20, validation data at epoch 30" in capsys.readouterr().out


def test_of_many_training_samples_some_are_measured_and_said(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are allowed, spread over all of them: data in the order of their classes would say something else at first."""
    monkeypatch.setattr("prunekit.training.record.AT_MOST", 200)
    told = cli("train", write(tmp_path, ""), "--out", tmp_path / "run").out
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    sizes = {name: len(digits()[name][1]) for name in ("train", "validation")}
    assert record["samples"] == dict.fromkeys(sizes, 200)
    assert "on 200 samples of training, " in told
    assert " on 200 samples of validation data" in told
    path, model = Trajectory(tmp_path / "run" / "trajectory"), digits_cnn((4, 4, 4))
    load_into(model, path.model_state(len(path)), path.folder)
    for name, size in sizes.items():
        outputs, labels = predict(model, Split(digits()[name]).batches(256))
        some = [number * size // 200 for number in range(200)]
        assert record["accuracy"][name] == pytest.approx(accuracy(outputs[some], labels[some]), abs=1e-6)


def test_training_ends_once_both_accuracies_are_reached(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", write(tmp_path, "watch: {every: 1, until: 0.01}"), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (record["steps"], len(record["losses"]), len(Trajectory(tmp_path / "run" / "trajectory"))) == (4, 1, 4)
    again = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--json")
    assert (again.code, json.loads(again.out)["reused"]) == (0, True)


@pytest.mark.slow
def test_dropped_and_augmented_batches_are_in_the_record(cli: Cli, tmp_path: Path) -> None:
    recipe = write(tmp_path, "drop_last: true, augment: horizontal_flip")
    assert cli("train", recipe, "--out", tmp_path / "run").code == 0
    path = Trajectory(tmp_path / "run" / "trajectory")
    steps = [path.step(s) for s in range(len(path))]
    assert [len(step.batches[0]) for step in steps if step.batches] == [256] * (4 * (len(digits()["train"][0]) // 256))
    assert len({step.seeds[0] for step in steps}) == len(steps)
    write(tmp_path, "augment: horizontal_flip")
    refused = cli("train", recipe, "--out", tmp_path / "run")
    assert refused.code == 1
    assert "drop_last was True" in refused.err


def test_an_unknown_augmentation_names_the_known(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", write(tmp_path, "augment: horizontal_flop"), "--out", tmp_path / "run")
    assert done.code == 2
    assert "did you mean horizontal_flip" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("steps", [["--finetune", "1"], ["--rewind", "2"]])
def test_training_on_uses_the_same_batches_and_ends_where_the_dense_training_did(
    cli: Cli, tmp_path: Path, steps: list[str]
) -> None:
    options = "drop_last: true, augment: horizontal_flip, watch: {every: 1, until: 0.01}"
    assert cli("train", write(tmp_path, options), "--out", tmp_path / "run").code == 0
    assert cli("score", tmp_path / "run", "--criterion", "magnitude").code == 0
    done = cli("prune", tmp_path / "run", "--criterion", "magnitude", "--sparsity", "0.5", "--name", "a", *steps)
    assert done.code == 0, done.err
    dense, child = (Trajectory(tmp_path / "run" / where / "trajectory") for where in ("", "pruned/a"))
    taken = [child.step(s) for s in range(len(child)) if child.step(s).moved]
    first = 2 if "--rewind" in steps else 0
    assert (len(dense), len(taken)) == (3, 3 - first)
    for number, step in enumerate(taken):
        assert (step.batches, step.seeds) == (dense.step(first + number).batches, dense.step(first + number).seeds)
