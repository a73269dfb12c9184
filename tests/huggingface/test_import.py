"""``prunekit import --hf``, and recipes with ``model: {pretrained: DIR}``: every verb works on what came from a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prunekit import Run, Trajectory, trust
from prunekit.huggingface import load_model
from prunekit.recipe import Recipe
from tests.cli.conftest import Cli
from tests.huggingface.conftest import Save


def done(cli: Cli, *arguments: object) -> str:
    found = cli(*arguments)
    assert found.code == 0, found.err
    return found.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "data", "task", "structure", "dtype"),
    [
        ("bert", "classes", "classification", "heads", torch.float32),
        ("gpt2", "texts", "causal_lm", "channels", torch.float32),
        ("llama", "texts", "causal_lm", "heads", torch.float32),
        ("llama", "texts", "causal_lm", "channels", torch.bfloat16),
    ],
)
def test_from_a_folder_to_a_smaller_model(
    kind: str, data: str, task: str, structure: str, dtype: torch.dtype, save: Save, words: str, cli: Cli, tmp_path: Path
) -> None:
    folder, run = save(kind, dtype=dtype), tmp_path / "run"
    told = json.loads(done(cli, "import", "--hf", folder, "--data", f"{words}:{data}", "--out", run, "--json"))
    assert told["task"] == task
    weights = load_model(folder).state_dict()
    state = Trajectory(run / "trajectory").model_state()
    assert all(torch.equal(weights[name].to(tensor), tensor) for name, tensor in state.items())
    for file in folder.glob("*.safetensors"):
        file.unlink()  # what the run holds is enough from here on
    done(cli, "score", run, "--criterion", "magnitude", "--criterion", "taylor")
    done(cli, "prune", run, "--criterion", "taylor", "--sparsity", "0.5", "--name", "masks")
    done(cli, "prune", run, "--criterion", "taylor", "--structure", structure, "--sparsity", "0.25", "--name", "small")
    for name in ("masks", "small"):
        done(cli, "eval", run / "pruned" / name)
    small = json.loads((run / "pruned" / "small" / "eval.json").read_text())
    assert small["pruned"]["parameters"] < small["dense"]["parameters"]


@pytest.mark.slow
def test_checkpoints_of_a_trainer_are_a_path_in_the_order_of_their_numbers(save: Save, cli: Cli, tmp_path: Path) -> None:
    first, second, third = (save("bert", f"out/checkpoint-{step}", seed=step) for step in (5, 20, 100))
    run, alone = tmp_path / "run", tmp_path / "named"
    assert "a path of 3 checkpoints" in done(cli, "import", "--hf", tmp_path / "out", "--out", run)
    done(cli, "import", "--hf", first, "--hf", second, "--hf", third, "--out", alone)
    assert Trajectory(run / "trajectory").hash == Trajectory(alone / "trajectory").hash
    name = "classifier.weight"
    state = Trajectory(run / "trajectory").model_state(0)
    assert torch.equal(state[name], load_model(first).state_dict()[name])
    assert Run(run).recipe.model.pretrained == str(third)


def test_python_makes_the_same_run(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    folder = save("bert", config={"num_labels": 1})
    made = Run.from_pretrained(tmp_path / "made", folder, data=f"{words}:classes")
    done(cli, "import", "--hf", folder, "--data", f"{words}:classes", "--out", tmp_path / "run")
    assert made.trajectory.hash == Run(tmp_path / "run").trajectory.hash
    assert made.recipe.task == "regression"
    named = Run.from_pretrained(tmp_path / "named", folder, data=f"{words}:classes", task="unlabelled")
    assert named.recipe.task == "unlabelled"


@pytest.mark.slow
def test_training_begins_with_the_folders_weights(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    folder = save("bert")
    train = "{epochs: 1, batch_size: 24, optimizer: {lr: 0.01}}"
    (tmp_path / "mine.yaml").write_text(f'model: {{pretrained: bert}}\ndata: {{factory: "{words}:classes"}}\ntrain: {train}\n')
    done(cli, "train", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    trajectory = Trajectory(tmp_path / "run" / "trajectory")
    first, last = (trajectory.model_state(s)["classifier.weight"] for s in (0, len(trajectory)))
    assert torch.equal(first, load_model(folder).state_dict()["classifier.weight"])
    assert not torch.equal(first, last)
    done(cli, "score", tmp_path / "run", "--criterion", "magnitude")


def test_a_recipe_finds_the_folder_beside_itself_and_says_where_it_is(save: Save, tmp_path: Path) -> None:
    folder = save("bert")
    (tmp_path / "mine.yaml").write_text("model: {pretrained: bert, auto: AutoModelForSequenceClassification}\n")
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert recipe.model_dump()["model"] == {"pretrained": str(folder), "auto": "AutoModelForSequenceClassification"}
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert "pretrained" not in recipe.training_facts()["model"]  # the folder may move
    assert torch.equal(recipe.build_model().classifier.weight, load_model(folder).classifier.weight)  # type: ignore[union-attr]


def test_another_model_of_the_same_run_is_refused(save: Save, cli: Cli, tmp_path: Path) -> None:
    folder, run = save("bert"), tmp_path / "run"
    done(cli, "import", "--hf", folder, "--out", run)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    found = cli("score", run, "--criterion", "magnitude")
    assert (found.code, "config.json: not what the run was made with" in found.err) == (1, True)
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    done(cli, "score", run, "--criterion", "magnitude")
    shutil.rmtree(folder)
    found = cli("score", run, "--criterion", "random")
    assert (found.code, f"{folder}: no such folder" in found.err) == (1, True)


@pytest.mark.slow
def test_weights_that_the_user_names_go_into_the_folders_class(save: Save, cli: Cli, tmp_path: Path) -> None:
    folder, run = save("bert"), tmp_path / "run"
    state = load_model(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    found = cli("import", "--hf", folder, "--out", run)
    assert found.code == 1
    assert f"give --weights {folder / 'pytorch_model.bin'}" in found.err
    done(cli, "import", "--hf", folder, "--weights", folder / "pytorch_model.bin", "--out", run)
    name = "classifier.weight"
    assert torch.equal(Trajectory(run / "trajectory").model_state()[name], state[name])


def test_a_folder_is_data_to_whoever_trusts_nothing(save: Save) -> None:
    folder = save("bert", "os:system")
    assert trust.imports_of({"model": {"pretrained": str(folder), "auto": None}}) == []
    assert trust.imports_of({"model": {"factory": "os:system"}}) != []
