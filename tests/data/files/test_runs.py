"""Runs on data in files: from a folder and a table to a pruned model and its report; what the run keeps of the data."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

import prunekit
from prunekit import Run
from prunekit.data.files import read
from prunekit.recipe import Recipe, read_yaml
from prunekit.trust import imports_of
from prunekit.verbs.run_folder import load_splits
from tests.cli.conftest import Cli, cli, few, pictures
from tests.data.files.conftest import Home, Write, reviews

__all__ = ["cli", "few", "pictures"]
ROWS = reviews(80)


@pytest.fixture(scope="module")
def bert(home: Home) -> Path:
    return home("bert", weights=True, num_labels=2)


@pytest.fixture
def table(write: Write) -> Path:
    place = write("reviews.csv", "")
    with place.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "content", "stars"])
        writer.writerows([number, row["text"], row["label"]] for number, row in enumerate(ROWS))
    return place


@pytest.mark.slow
def test_from_a_table_to_a_report(bert: Path, table: Path, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    imported = cli(
        "import", "--hf", bert, "--data", table, "--text", "content", "--label", "stars", "--length", "16", "--out", run
    )
    assert imported.code == 0, imported.err
    assert "classes neg=0, pos=1 (in the order of the alphabet)" in imported.err
    for command in (
        ("score", run, "--criterion", "magnitude", "--criterion", "taylor"),
        ("prune", run, "--criterion", "taylor", "--structure", "heads", "--sparsity", "0.2", "--name", "small"),
        ("eval", run / "pruned" / "small"),
        ("report", run),
    ):
        found = cli(*command)
        assert found.code == 0, found.err
    assert (run / "report.html").exists()


def test_the_run_keeps_the_order_of_the_classes_and_where_the_data_lie(
    bert: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = table.parent / "recipe.yaml"
    data = {"files": table.name, "text": "content", "label": "stars", "seed": 3}
    recipe.write_text(yaml.safe_dump({"model": {"pretrained": str(bert)}, "data": data}))
    monkeypatch.chdir(tmp_path)
    found = Recipe.load(recipe)
    assert found.data is not None
    assert found.data.files == str(table)
    run = Run.from_pretrained(tmp_path / "run", bert, data=table, data_args={"text": "content", "label": "stars", "seed": 3})
    said = read_yaml(run.path / "recipe.yaml")
    assert said["data"]["classes"] == ["neg", "pos"]
    assert Recipe.load(run.path / "recipe.yaml").data == run.recipe.data
    assert not imports_of({**said, "data": {**said["data"], "text": ["os:system"], "files": {"train": "os:system"}}})
    assert run.splits["test"].digest() == load_splits(found)["test"].digest()
    with table.open("a") as out:
        out.write("81,a new one,pos\n")
    assert run.splits["test"].digest() != Run(run.path).splits["test"].digest()


def test_a_language_models_run_notes_the_bytes_of_its_tokens(home: Home, write: Write, tmp_path: Path) -> None:
    place = write("corpus.jsonl", [{"text": row["text"]} for row in ROWS])
    run = Run.from_pretrained(tmp_path / "run", home("llama", weights=True), data=str(place), data_args={"length": 16})
    rows = run.splits["test"].source
    assert run.recipe.task == {"name": "causal_lm", "bytes_per_token": round(rows.bytes_per_token, 6)}
    assert [measure.name for measure in run.task.measures][:2] == ["perplexity", "bits_per_byte"]


def test_options_are_for_files_and_refusals_leave_nothing(bert: Path, table: Path, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for options, why in (
        (("--text", "a"), "--text without --data"),
        (("--data", "my_module:data", "--skip-bad"), "--skip-bad goes with data in files"),
        (("--data", table, "--label", "stars", "--data-args", '{"label": "x"}'), "--data-args has label"),
        (("--data", table, "--label", "stars", "--text", "body"), "has no column 'body' (text)"),
        (("--data", table, "--label", "id"), "the model has 2 classes"),
    ):
        found = cli("import", "--hf", bert, *options, "--out", run)
        assert found.code == 2
        assert why in found.err
        assert found.err.count("\n") == 1
        assert not [path for path in run.rglob("*") if path.is_file() and path.name[0] != "."]


def test_a_run_folder_fetches_nothing(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def asked(*given: Any, **how: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    recipe = Recipe.of({"model": {"pretrained": str(bert)}, "data": {"files": "hf://datasets/somebody/reviews"}}, "test")
    with pytest.raises(prunekit.PrunekitError, match="from the cache of datasets"):
        load_splits(recipe)


def test_a_split_goes_into_compress(bert: Path, write: Write) -> None:
    import transformers

    splits = read(write("rows.jsonl", ROWS), model=bert, task="classification", length=16)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    small = prunekit.compress(model, splits["train"], task="classification", criteria="magnitude", refine_seconds=0)
    assert sum(small.report["samples"].values()) == len(splits["train"])
