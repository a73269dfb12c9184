"""Every example of docs/tasks.md, run as it is written: train, score, compare, prune, eval, report; what it measures is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import prunekit
from benchmarks.zoo.verbs import FILES
from prunekit.cli import main
from prunekit.recipe import pruning
from tests.pictures import undrawn

FIRST = {
    "classes": "accuracy", "yesno": "accuracy", "labels": "accuracy", "numbers_": "rmse", "pixels": "miou", "tagger": "accuracy",
    "writer": "perplexity", "blanks": "perplexity", "answer": "perplexity", "vae": "error",
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(pruning, "TRY_FOR", "0.2s")  # recipes stay as written; how well a search ends is not what they show
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in FILES:  # another test's module of the same name
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    with undrawn():
        yield tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prunekit", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert stop.value.code in (0, None), said.err
        return said.out

    return call


def test_every_recipe_is_looked_at() -> None:
    assert {name.removesuffix(".yaml") for name in FILES if name.endswith(".yaml")} == set(FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_example_runs(name: str, here: Path, run: Callable[..., str]) -> None:
    run("run", f"{name}.yaml", "--out", name, "--quiet")
    (folder,) = (here / name / "pruned").iterdir()
    found = json.loads((folder / "eval.json").read_text())
    assert found["measures"][0]["name"] == FIRST[name]
    assert FIRST[name] in found["pruned"]
    assert FIRST[name] in json.loads((here / name / "compare.json").read_text())["cells"][0]
    assert (here / name / "report.html").is_file()


def test_unlabelled_is_imported_and_goes_by_the_distance(here: Path, run: Callable[..., str]) -> None:
    import outputs

    save_file(outputs.build().state_dict(), "model.safetensors")
    run("import", "--model", "outputs:build", "--weights", "model.safetensors", "--data", "outputs:data", "--task", "unlabelled",
        "--out", "o", "--quiet")  # fmt: skip
    run("score", "o", "-c", "magnitude", "-c", "taylor(target=outputs,aggregation=l2)", "--quiet")
    run("prune", "o", "-c", "auto", "-s", "0.5", "--name", "half", "--no-refine", "--quiet")
    run("eval", "o/pruned/half", "--quiet")
    found = json.loads(Path("o/pruned/half/eval.json").read_text())
    assert found["measures"][0]["name"] == "divergence"
    model, (x, _) = outputs.build(), outputs.data()["test"]

    pruned = prunekit.load("o/pruned/half", outputs.build)
    state = __import__("safetensors.torch", fromlist=["load_file"]).load_file("model.safetensors")
    model.load_state_dict(state)
    with torch.no_grad():
        assert found["pruned"]["divergence"] == pytest.approx(
            float((pruned(x) - model(x)).double().square().mean().sqrt()), rel=1e-5
        )
