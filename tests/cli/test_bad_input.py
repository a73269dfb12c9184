"""Bad input gets one clear line, the right exit code, no traceback, and leaves artifacts as they were."""

from __future__ import annotations

import json
import pickle
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from prunekit import checkpoint
from prunekit.apply import Manifest
from prunekit.artifact import Artifact
from prunekit.errors import ArtifactError, UsageError
from prunekit.explain import EvaluationRecord
from prunekit.recipe import Recipe
from prunekit.search import Comparison
from prunekit.training.record import TrainingRecord
from tests.cli.conftest import RECIPE, Cli, Done, with_recipe
from tests.cli.test_pipeline import files


def one_line(done: Done, code: int, *said: str) -> None:
    assert done.code == code, done.err
    assert done.err.startswith("prunekit: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    for part in said:
        assert part in done.err, done.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 3", "sed: 3", ("sed is not a recipe key", "did you mean seed")),
        ("lr: 0.02", "lr: -1", ("train.optimizer.lr is -1", "greater than 0")),
        ("lr: 0.02", "rate: 1", ("train.optimizer.rate is not a recipe key",)),
        ("epochs: 3", "epochs: 0", ("train.epochs is 0",)),
        ("epochs: 3", "epochs: many", ("train.epochs is 'many'",)),
        ("name: adamw", "name: adamww", ("train.optimizer.name is 'adamww'",)),
        ("name: adamw", "name: adamw, momentum: 0.9", ("momentum is not an option of adamw",)),
        ("sparsity: 0.5", "sparsity: 1.0", ("prune.0.sparsity is 1.0",)),
        ("structure: channels", "structure: chanels", ("did you mean channels",)),
        ("name: small", "name: loose", ("name 'loose' is used twice",)),
        ("name: small", "name: ../x", ("prune.1.name",)),
        ("{samples: 24}", "{criteria: [influenc]}", ("score.criteria", "did you mean influence")),
        ("[classifier.weight]", "[clasifier.weight]", ("'clasifier.weight' matches no parameter",)),
        ("prunekit.models:digits_cnn", "prunekit.models:digit_cnn", ("model.factory", "did you mean digits_cnn")),
        ("prunekit.models:digits_cnn", "no_such_module:build", ("no module 'no_such_module'",)),
        ("prunekit.models:digits_cnn", "digits_cnn", ("must look like package.module:name",)),
        ("channels: [6, 8, 8]", "width: 3", ("model: prunekit.models:digits_cnn(", "TypeError")),
        ("\"prunekit.data:digits\"", "prunekit.models:digits_mlp", ("must return a mapping of splits",)),
        ("data: {factory: \"prunekit.data:digits\", args: {}}", "", ("has no data",)),
    ],
)  # fmt: skip
def test_recipes_are_checked_before_anything_runs(cli: Cli, tmp_path: Path, old: str, new: str, said: tuple[str, ...]) -> None:
    assert old in RECIPE
    (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new, 1).replace("epochs: 3", "epochs: 1"))
    verb = "run" if "ignore" in RECIPE and "clasifier" in new else "train"
    done = cli(verb, tmp_path / "r.yaml", "--out", tmp_path / "run", "--quiet")
    one_line(done, 1 if said == ("has no data",) else 2, *said)
    assert not (tmp_path / "run" / "trajectory").exists() or verb == "run"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a recipe is a mapping"),
        (b"- 1\n- 2\n", "a recipe is a mapping"),
        (b"seed: [", "not YAML"),
        (b"\xff\xfe\x00binary", "r.yaml"),
        (b"model: !!python/object/apply:os.system ['echo hi']", "not YAML"),
    ],
)
def test_files_that_are_no_recipes(cli: Cli, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run"), 2, said)
    one_line(cli("train", tmp_path / "none.yaml", "--out", tmp_path / "run"), 2, "no such recipe")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("score", "RUN", "-c", "influense"), "did you mean influence"),
        (("score", "RUN"), "criterion"),
        (("score", "RUN", "-c", "influence", "--target", "margins"), "did you mean margin"),
        (("prune", "RUN"), "--sparsity"),
        (("prune", "RUN", "-s", "1"), "sparsity is 1.0"),
        (("prune", "RUN", "-s", "-0.1"), "sparsity is -0.1"),
        (("prune", "RUN", "-s", "nan"), "sparsity is nan"),
        (("prune", "RUN", "-s", "half"), "half"),
        (("prune", "RUN", "-s", "0.5", "-c", "magnitud"), "did you mean magnitude"),
        (("prune", "RUN", "-s", "0.5", "--structure", "rows"), "structure 'rows' does not exist"),
        (("prune", "RUN", "-s", "0.5", "--allocation", "unifrom"), "did you mean uniform"),
        (("prune", "RUN", "-s", "0.5", "--name", "../up"), "--name is '../up'"),
        (("compare", "RUN", "--sparsity", "2"), "sparsity is 2.0"),
        (("compare", "RUN", "--structure", "chanels"), "did you mean channels"),
        (("score", "RUN", "-c", "magnitude", "--device", "nonsense"), "nonsense"),
        (("eval", "RUN"), "not RUN/pruned/NAME"),
        (("score", "nowhere", "-c", "magnitude"), "not a run folder"),
        (("train", "x.yaml"), "--out"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_use_exits_with_two(run: Path, cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    before = files(run)
    one_line(cli(*(str(run) if a == "RUN" else a for a in arguments)), 2, said)
    assert files(run) == before


DAMAGE = {
    "trajectory/trajectory.json": ("score", "-c", "magnitude", "--overwrite"),
    "trajectory/steps.jsonl": ("score", "-c", "influence", "--overwrite"),
    "trajectory/states-00000.safetensors": ("score", "-c", "influence", "--overwrite"),
    "scores/magnitude.safetensors": ("prune", "-c", "magnitude", "-s", "0.4", "--name", "x"),
    "compare.json": ("compare",),
    "recipe.yaml": ("compare",),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damaged_artifacts_are_refused_by_name(run: Path, cli: Cli, name: str, how: str) -> None:
    path = run / name
    verb, *rest = DAMAGE[name]
    if how == "missing":
        path.unlink()
        if verb == "compare" and name == "compare.json":
            assert cli(verb, run, *rest).code == 0
            return
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = files(run)
    done = cli(verb, run, *rest)
    one_line(done, 2 if name == "recipe.yaml" else 1, path.name)
    assert files(run) == before


@pytest.mark.parametrize("name", ["model.safetensors", "prunekit.json", "plan.safetensors"])
def test_damaged_pruned_models_are_refused_by_name(run: Path, cli: Cli, name: str) -> None:
    path = run / "pruned" / "small" / name
    path.write_bytes(path.read_bytes()[:-10])
    one_line(cli("eval", run / "pruned" / "small", "--overwrite"), 1, name)


def test_a_pickled_checkpoint_is_read_for_its_weights_alone(cli: Cli, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    done = cli("import", "--model", "prunekit.models:digits_cnn", "--weights", tmp_path / "m.pt", "--out", tmp_path / "run")
    one_line(done, 1, "m.pt: has w, which the model does not")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"w": print}))
    done = cli("import", "--model", "prunekit.models:digits_cnn", "--weights", tmp_path / "code.pt", "--out", tmp_path / "run")
    one_line(done, 1, "code.pt")
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "trajectory").exists()


def test_a_model_without_channels_is_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat_models.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(RECIPE)
    recipe["model"] = {"factory": "flat_models:build"}
    recipe["prunable"] = {"ignore": []}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert cli("train", "r.yaml", "--out", "run", "--quiet").code == 0
    assert cli("score", "run", "-c", "magnitude", "--quiet").code == 0
    one_line(cli("prune", "run", "-c", "magnitude", "-s", 0.5, "--structure", "channels"), 1, "no channels that can be removed")


def test_too_little_disk_is_said_before_training(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--quiet")
    one_line(done, 1, "MB are free")
    assert not (tmp_path / "run" / "trajectory").exists()


def test_diverging_training_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("name: adamw, lr: 0.02", "name: sgd, lr: 1.0e+6"))
    done = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--quiet")
    assert done.code == 1
    assert "NaN or Inf" in done.err or "lower train.lr" in done.err
    assert not (tmp_path / "run" / "trajectory").exists()


def test_json_artifacts_with_wrong_content(run: Path, cli: Cli) -> None:
    for path in (run / "compare.json", run / "pruned" / "loose" / "prunekit.json", run / "pruned" / "loose" / "eval.json"):
        path.write_text(json.dumps({"kind": "something else"}))
    one_line(cli("compare", run), 1, "compare.json")
    one_line(cli("prune", run, "-s", 0.5, "--name", "loose"), 1, "loose")
    one_line(cli("eval", run / "pruned" / "loose"), 1, "prunekit.json")
    one_line(cli("info", run / "pruned" / "small" / "x"), 1, "no such file")


@pytest.mark.parametrize("refine", ["yes", 3, [], {"history": 2}, {}])
def test_info_names_a_manifest_that_was_damaged_by_hand(run: Path, cli: Cli, refine: object) -> None:
    path = run / "pruned" / "loose" / "prunekit.json"
    content = checkpoint.read_json(path)
    content["provenance"]["refine"] = refine
    checkpoint.write_json(path, content)
    one_line(cli("info", path.parent), 1, f"{path}: not a whole manifest")


def test_two_writers_in_one_folder(run: Path, cli: Cli) -> None:
    from prunekit.durable import locked

    before = files(run)
    with locked(run):
        one_line(cli("compare", run), 1, "another prunekit is writing here")
    assert files(run) == before
    assert cli("compare", run).code == 0


def test_a_recipe_of_the_users_own_is_not_replaced(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + "# mine\n")
    done = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path)
    one_line(done, 2, "recipe.yaml: is not a recipe that prunekit wrote")
    assert (tmp_path / "recipe.yaml").read_text().endswith("# mine\n")


@pytest.mark.parametrize("row", [0.5, 0.999])
def test_states_that_were_changed_are_noticed(run: Path, cli: Cli, tmp_path: Path, row: float) -> None:
    path = run / "trajectory" / "states-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[int(len(content) * row) // 4 * 4 + 2] ^= 1
    path.write_bytes(bytes(content))
    (tmp_path / "r.yaml").write_text(RECIPE)
    one_line(cli("train", tmp_path / "r.yaml", "--out", run), 1, "was changed after it was recorded")
    one_line(cli("score", run, "-c", "influence", "--overwrite"), 1, "was changed after it was recorded")
    if row > 0.9:  # the trained weights themselves
        one_line(cli("compare", run, "--overwrite"), 1, "was changed after it was recorded")


REUSED = {
    "trajectory/fixed.safetensors": ("train", "RECIPE", "--out", "RUN"),
    "train.json": ("train", "RECIPE", "--out", "RUN"),
    "scores/taylor.safetensors": ("score", "RUN", "-c", "taylor"),
    "pruned/small/model.safetensors": ("prune", "RUN", "-s", 0.5, "--structure", "channels", "--name", "small", "--no-refine"),
    "pruned/loose/masks.safetensors": ("prune", "RUN", "-s", 0.5, "--name", "loose", "--no-refine"),
    "pruned/loose/eval.json": ("eval", "RUN/pruned/loose"),
}


@pytest.mark.parametrize("name", REUSED)
def test_damaged_artifacts_are_not_reused(run: Path, cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    places = {"RUN": str(run), "RECIPE": str(tmp_path / "r.yaml"), "RUN/pruned/loose": str(run / "pruned" / "loose")}
    command = [places.get(str(a), a) for a in REUSED[name]]
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2])
    done = cli(*command)
    one_line(done, 1, "--overwrite", Path(name).name)
    assert cli(*command, "--overwrite").code == 0
    assert "reused" in cli(*command).out


def test_compare_makes_its_picture_and_table_again(run: Path, cli: Cli) -> None:
    table = (run / "compare.csv").read_bytes()
    (run / "compare.csv").write_text("junk")
    (run / "compare.png").unlink()
    assert cli("compare", run).code == 0
    assert (run / "compare.csv").read_bytes() == table
    assert (run / "compare.png").exists()


KEYS: dict[str, tuple[type[Artifact], tuple[str, ...]]] = {
    "compare.json": (Comparison, ("cells", "dense", "made_from", "schema")),
    "train.json": (TrainingRecord, ("losses", "accuracy", "steps")),
    "pruned/small/prunekit.json": (Manifest, ("kept", "attributes", "provenance", "plan", "schema")),
    "pruned/small/eval.json": (EvaluationRecord, ("made_from", "kernel", "latency", "pruned")),
}
READERS = {
    "compare.json": ("compare", "prune", "report", "info"),
    "train.json": ("train", "compare", "report", "info"),
    "trajectory/trajectory.json": ("train", "compare", "prune", "eval", "report", "info"),
    "pruned/small/prunekit.json": ("prune", "eval", "report", "info"),
    "pruned/small/eval.json": ("eval", "report", "info"),
}
WRONG = ("absent", None, [], "text")
RIGHT = [("losses", []), ("accuracy", None), ("plan", "text"), ("kernel", None)]  # what a whole file may say


def changed(content: dict, key: str, value: object) -> dict:
    return {k: v for k, v in {**content, key: value}.items() if (k, v) != (key, "absent")}


@pytest.mark.parametrize("name", KEYS)
def test_json_with_missing_or_mistyped_keys(finished: Path, tmp_path: Path, name: str) -> None:
    """Refused where the file is read, so by every verb that does."""
    kind, keys = KEYS[name]
    whole, path = checkpoint.read_json(finished / name), tmp_path / "file.json"
    for key, value in product(keys, WRONG):
        checkpoint.write_json(path, changed(whole, key, value))
        if (key, value) in RIGHT:
            kind.load(path)
            continue
        with pytest.raises(ArtifactError, match=f"not a whole {kind.CALLED}.*make it again") as refused:
            kind.load(path)
        assert str(refused.value).startswith(f"{path}: "), (key, value)
        assert "\n" not in str(refused.value), (key, value)


def told_by_name(cli: Cli, run: Path, name: str, *verbs: str) -> None:
    """Each verb works or says one line, and not that of the last resort."""
    (run.parent / "r.yaml").write_text(RECIPE)
    commands = {
        "train": (run.parent / "r.yaml", "--out", run),
        "compare": (run,),
        "prune": (run, "-s", 0.5, "--structure", "channels", "--name", "small", "--no-refine"),
        "eval": (run / "pruned" / "small",),
        "report": (run,),
        "info": (run / name,),
    }
    for verb in verbs:
        done = cli(verb, *commands[verb])
        assert done.code in (0, 1)
        assert "Traceback" not in done.err
        assert "PRUNEKIT_DEBUG" not in done.err, done.err
        assert done.err.count("\n") == done.code


@pytest.mark.parametrize("name", READERS)
def test_every_reader_tells_of_a_mistyped_key(run: Path, cli: Cli, name: str) -> None:
    key = KEYS[name][1][0] if name in KEYS else "states"
    checkpoint.write_json(run / name, changed(checkpoint.read_json(run / name), key, "text"))
    told_by_name(cli, run, name, *READERS[name])


@pytest.mark.parametrize("key", ["layout", "optimizer", "states", "every", "complete", "provenance"])
def test_a_trajectory_with_missing_or_mistyped_keys(run: Path, cli: Cli, key: str) -> None:
    """Not all are looked at when it is opened: training goes on with some, pruning reads others."""
    name = "trajectory/trajectory.json"
    whole = checkpoint.read_json(run / name)
    for value in WRONG:
        checkpoint.write_json(run / name, changed(whole, key, value))
        told_by_name(cli, run, name, "train", "prune", "info")


def test_code_in_a_run_folder_is_not_reached_by_a_dotted_name(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "my_module.py").write_text("raise SystemExit('it ran')\n")
    with_recipe(run, model={"factory": "run.my_module:build", "args": {}})
    monkeypatch.chdir(run.parent)
    one_line(cli("score", "run", "-c", "magnitude", "--overwrite"), 2, "lies in the run folder")
    assert cli("trust", "run", "--yes").code == 0
    one_line(cli("score", "run", "-c", "magnitude", "--overwrite"), 2, "lies in the run folder")  # whatever one trusts


USERS = {
    "out = self.layer(x.flatten(1)); out = (out, out)": "the model returned tuple of 0 (",
    "out = self.layer(x)": "fails on data of the train split",
    "out = self.layer(x.flatten(1)).sum()": "must return one float tensor",
    "out = self.layer(x.flatten(1)) / 0": "NaN or Inf",
}


@pytest.mark.parametrize("body", USERS)
def test_models_that_do_not_take_their_data(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    name = f"user_models_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\nclass Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.layer = nn.Linear(64, 10)\n    def forward(self, x):\n        {body}\n        return out\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = {**yaml.safe_load(RECIPE), "model": {"factory": f"{name}:Model"}, "prunable": {"ignore": []}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", "r.yaml", "--out", "run"), 2, USERS[body])
    assert not (tmp_path / "run" / "trajectory").exists()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("y + 3", "go from 3 to"),
        ("y.float()", "class indices are int64"),
        ("y[:-1]", "not one each a sample"),
        ("y - 1", "from -1"),
    ],
)
def test_labels_are_checked_in_every_split(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, said: str
) -> None:
    name = f"user_data_{abs(hash(labels))}"
    (tmp_path / f"{name}.py").write_text(
        "from prunekit.data import digits\ndef data():\n    splits = digits()\n    x, y = splits['validation']\n"
        f"    splits['validation'] = (x, {labels})\n    return splits\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = {**yaml.safe_load(RECIPE), "data": {"factory": f"{name}:data"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", "r.yaml", "--out", "run"), 2, said)


def test_places_that_cannot_be_written(run: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "r.yaml").write_text(RECIPE)
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "file" / "x" / "y"), 1, "could not be written")
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "file"), 1, "could not be written")
    (run / "pruned" / "mine").mkdir()
    (run / "pruned" / "mine" / "notes.txt").write_text("mine")
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.5, "--name", "mine", "--overwrite"), 1, "notes.txt")
    assert (run / "pruned" / "mine" / "notes.txt").exists()
    one_line(cli("info", ""), 2, "an argument is empty")


def test_report_leaves_out_what_is_stale(run: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("seed: 3", "seed: 4"))
    assert cli("train", tmp_path / "r.yaml", "--out", run, "--overwrite", "--quiet").code == 0
    done = cli("report", run)
    assert done.code == 0
    assert done.out.count("left out") == 5 + 1 + 2 + 1  # scores, comparison, evaluations, timeline
    assert "Criteria compared" not in (run / "report.html").read_text()


def test_a_users_prints_stay_out_of_json(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud_models.py").write_text(
        "from prunekit.models import digits_cnn\ndef build():\n    print('hello')\n    return digits_cnn([4, 4, 4])\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = {**yaml.safe_load(RECIPE), "model": {"factory": "loud_models:build"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert json.loads(cli("train", "r.yaml", "--out", "run", "--json").out)["steps"] > 0
    assert cli("score", "run", "-c", "magnitude", "--quiet") == (0, "", "")


def test_a_value_of_another_shape_is_told_in_our_words() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.of({"model": 3, "data": {"factory": "a:b"}, "task": [1], "score": {"criteria": "magnitude"}}, "r.yaml")
    told = str(caught.value)
    assert "model is 3: a section of keys and values is wanted here" in told
    assert "task is [1]: it should be a valid string, or a mapping of names to values is wanted here" in told
    assert "score.criteria is 'magnitude': a list is wanted here" in told
    assert "Input" not in told
    assert "dict[" not in told
