"""prune in steps on the command line and in a recipe: what is written, reused, refused, and explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import prunekit
from prunekit.models import digits_cnn
from prunekit.models.digits import DigitsCNN
from prunekit.trajectory import Continued
from tests.cli.conftest import RECIPE, Cli
from tests.cli.test_pipeline import files, small_cnn
from tests.interrupt import ctrl_c, trains


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """The finished run without what compare, prune and report wrote; these tests only add pruned models to it."""
    import shutil

    folder = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("pruned", "compare.*", "report.html"))
    return folder


STEPS = {
    "iterative": ["--schedule", "iterative", "--rounds", 3],
    "tuned": ["--schedule", "iterative", "--rounds", 2, "--finetune", 1, "--distill", 0.5, "--recalibrate"],
    "gradual": ["--schedule", "gradual", "--rounds", 3, "--every", 2, "--finetune", 1, "--lr", 0.01],
    "rewound": ["--rewind", 9, "--structure", "channels"],
    "channels": ["--finetune", 0.4, "--structure", "channels"],
}


@pytest.mark.parametrize("name", STEPS)
def test_round_trip(scored: Path, cli: Cli, name: str) -> None:
    before = prunekit.Trajectory(scored / "trajectory").hash
    asked = ("prune", scored, "-c", "magnitude", "-s", 0.6, "--name", name, *STEPS[name])
    done = cli(*asked)
    assert done.code == 0, done.err
    folder = scored / "pruned" / name
    manifest = json.loads((folder / "prunekit.json").read_text())
    facts, tuned = manifest["facts"], name != "iterative"
    assert (folder / "trajectory").exists() == tuned
    model = prunekit.load(folder, small_cnn)
    with torch.no_grad():
        from prunekit.data import digits

        x, y = digits()["validation"]
        assert facts["validation_accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    if name in ("iterative", "tuned", "gradual"):
        assert sum(int((m == 0).sum()) for m in _masks(folder).values()) == round(0.6 * 1062)
    steps = {"iterative": 0, "tuned": 16, "gradual": 8, "rewound": 24 - 9, "channels": 8}[name]
    assert sum(r["steps"] for r in facts["rounds"]) == steps
    assert len(facts["rounds"]) == facts["schedule"]["rounds"] == {"iterative": 3, "tuned": 2, "gradual": 3}.get(name, 1)
    if tuned:
        assert facts["finetune"]["steps"] == steps
        child = prunekit.Trajectory(folder / "trajectory")
        assert child.provenance["parent"] == {"trajectory": before, "step": 9 if name == "rewound" else 24}
        Continued(prunekit.Trajectory(scored / "trajectory"), child).verify()
    assert "reused" in cli(*asked).out
    assert prunekit.Trajectory(scored / "trajectory").hash == before

    assert cli("eval", folder).code == 0
    kernel = json.loads((folder / "eval.json").read_text())["kernel"]
    assert kernel["pruned"]["steps"] == {"dense": 9 if name == "rewound" else 24, "finetuning": steps}
    assert "new_values" not in kernel["pruned"]  # masked alone, whatever its statistics became
    assert kernel["pruned"]["mean_error"] < 0.05 * kernel["pruned"]["mean_output"] + 0.005
    assert kernel["pruned"]["argmax_agreement"] > 0.85
    assert ("certificate" in kernel["pruned"].get("finetuning", {})) == tuned
    assert sum(v["share"] for v in kernel["pruned"]["by_layer"].values()) == pytest.approx(1)
    assert "reused" in cli("eval", folder).out
    assert json.loads(cli("info", folder, "--json").out)["kind"] == "pruned"
    if name == "tuned":
        assert cli("report", scored).code == 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("refined", [(), ("--refine",)], ids=["plain", "refined"])
def test_runs_keep_their_number_through_fine_tuning(scored: Path, cli: Cli, refined: tuple[str, ...]) -> None:
    """N:M goes at once, which is no schedule of several prunings, and is held while the rest trains."""
    name = "nm-refined" if refined else "nm"
    asked = ("prune", scored, "-c", "magnitude", "--structure", "2:4", "--finetune", 1, "--recalibrate", "--name", name, *refined)
    done = cli(*asked)
    assert done.code == 0, done.err
    model = prunekit.load(scored / "pruned" / name, small_cnn)
    for parameter, mask in _masks(scored / "pruned" / name).items():
        kept = mask.flatten(1)[:, : mask[0].numel() // 4 * 4].unflatten(1, (-1, 4)).sum(2)
        assert (kept == 2).all()
        assert not model.get_parameter(parameter)[mask == 0].any()
    assert "reused" in cli(*asked).out
    assert cli("eval", scored / "pruned" / name).code == 0


def test_an_edited_plan_can_be_fine_tuned(scored: Path, cli: Cli) -> None:
    plain = ("prune", scored, "-c", "magnitude", "-s", 0.5, "--structure", "channels", "--name", "edited")
    assert cli(*plain, "--dry-run").code == 0
    path = scored / "pruned" / "edited" / "plan.safetensors"
    applied = ("prune", scored, "--apply", path, "--finetune", 1)
    assert cli(*applied).code == 0  # as it is, first
    assert "reused" in cli(*applied).out
    for other in (("prune", scored, "--apply", path), plain, ("prune", scored, "--apply", path, "--finetune", 2)):
        done = cli(*other)
        assert done.code == 1, other
        assert "--overwrite" in done.err
    plan = prunekit.Plan.load(path)
    keep = torch.zeros(6, dtype=torch.bool)
    keep[2] = True
    plan.edited({"conv1": keep}).save(path)
    done = cli(*applied, "--overwrite")
    assert done.code == 0, done.err
    assert "edited by hand" in done.out
    assert prunekit.load(path.parent, small_cnn).conv1.out_channels == 1
    assert cli("eval", path.parent).code == 0
    done = cli(*applied, "--schedule", "iterative")
    assert done.code == 2
    assert "makes its own" in done.err


def test_kept_weights_alone_along_the_whole_path(scored: Path, cli: Cli) -> None:
    """(c) for a model with two prunings against per-weight shares of every piece: f_0 + Σ_{i kept} (ψ_i + ψ_i^reg)."""
    from prunekit.data import digits
    from prunekit.explain.account import _kept_alone
    from prunekit.kernel import ModelFunction, attribute

    asked = ["--schedule", "iterative", "--rounds", 2, "--finetune", 1]
    assert cli("prune", scored, "-c", "magnitude", "-s", 0.6, "--name", "kept", *asked).code == 0
    folder = scored / "pruned" / "kept"
    path = Continued(prunekit.Trajectory(scored / "trajectory"), prunekit.Trajectory(folder / "trajectory"))
    x, y = (t[:4] for t in digits()["test"])
    masks = {n: m.float() for n, m in _masks(folder).items()}
    function = ModelFunction(small_cnn(), path.layout, path.fixed)
    total = function(path.state(0), x, y)
    pieces = list(path.segments())
    last = max(n for n, s in enumerate(pieces) if s.jump) + 1
    for some, nodes in ((pieces[:last], 1), (pieces[last:], 64)):  # the last steps' change is taken exactly
        for part in attribute(function, lambda some=some: iter(some), x, y, share="whole", nodes=nodes):
            for name, signed in part.scores.items():
                total[part.samples] += (signed * masks[name] if name in masks else signed).flatten(2).sum(2)
    flat = torch.cat([masks[e.name].flatten() if e.name in masks else torch.ones(e.size) for e in path.layout])
    found = _kept_alone(function, path.parent, path, flat, x, y, 1)
    torch.testing.assert_close(found, total, atol=1e-3, rtol=1e-3)


def _masks(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "masks.safetensors")


def test_the_same_request_gives_the_same_bits(scored: Path, cli: Cli) -> None:
    for name in ("one", "two"):
        done = cli("prune", scored, "-c", "taylor", "-s", 0.6, "--name", name, *STEPS["tuned"], "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
    one, two = (files(scored / "pruned" / n) for n in ("one", "two"))
    assert {k for k in one if one[k] != two[k]} <= {"prunekit.json", "trajectory/trajectory.json"}
    assert one["model.safetensors"] == two["model.safetensors"]


def test_recipe_keys(run: Path, cli: Cli, tmp_path: Path) -> None:
    entry = {
        "name": "slow", "criterion": "magnitude", "sparsity": 0.5, "schedule": {"name": "iterative", "rounds": 2},
        "finetune": {"epochs": 1, "lr": 0.005, "distill": {"temperature": 2, "weight": 0.5}}, "recalibrate": True,
    }  # fmt: skip
    recipe = yaml.safe_load(RECIPE)
    recipe["prune"].append(entry)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("run", tmp_path / "r.yaml", "--out", run)
    assert done.code == 0, done.err
    assert "round 2: removed 0.5000, validation accuracy" in done.out
    assert "no BatchNorm layer" in done.out
    found = json.loads((run / "pruned" / "slow" / "eval.json").read_text())
    assert found["kernel"]["pruned"]["steps"]["finetuning"] == 16
    assert cli("run", tmp_path / "r.yaml", "--out", run).out.count("reused") == 1 + 5 + 1 + 3 + 3


def test_changed_steps_are_refused_without_overwrite(scored: Path, cli: Cli) -> None:
    asked = ("prune", scored, "-c", "magnitude", "-s", 0.5, "--name", "changed")
    assert cli(*asked, "--finetune", 1).code == 0
    before = files(scored / "pruned" / "changed")
    for other, said in ((["--finetune", 2], "finetune.epochs was 1.0, is now 2.0"), ([], "finetune was"),
                        (["--finetune", 1, "--lr", 0.1], "finetune.lr was None, is now 0.1")):  # fmt: skip
        done = cli(*asked, *other)
        assert done.code == 1
        assert said in done.err
    assert files(scored / "pruned" / "changed") == before
    (scored / "pruned" / "changed" / "notes.txt").write_text("mine")
    done = cli(*asked, "--finetune", 2, "--overwrite")
    assert done.code == 1
    assert "notes.txt" in done.err


def test_a_damaged_fine_tuning_is_told(scored: Path, cli: Cli) -> None:
    asked = ("prune", scored, "-c", "magnitude", "-s", 0.5, "--name", "damaged", "--finetune", 1)
    assert cli(*asked).code == 0
    path = scored / "pruned" / "damaged" / "trajectory" / "states-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for done in (cli(*asked), cli("eval", scored / "pruned" / "damaged")):
        assert done.code == 1
        assert done.err.count("\n") == 1
    assert cli(*asked, "--overwrite").code == 0
    assert cli("eval", scored / "pruned" / "damaged").code == 0


def test_interrupted_fine_tuning_leaves_nothing(scored: Path, cli: Cli) -> None:
    before = files(scored)
    with ctrl_c(DigitsCNN, trains, call=5):
        assert cli("prune", scored, "-c", "magnitude", "-s", 0.5, "--name", "cut", "--finetune", 1).code == 130
    assert files(scored) == before
    assert not list((scored / "pruned").glob("*cut*")) + list((scored / "pruned").glob(".prunekit*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--schedule", "slow"], "schedule 'slow' does not exist"),
        (["--schedule", "gradual"], "give finetune (--finetune EPOCHS)"),
        (["--schedule", "gradual", "--finetune", 1, "--rounds", 9], "lower rounds or every"),
        (["--schedule", "gradual", "--finetune", 1, "--rewind", 3], "one-shot or iterative"),
        (["--rounds", 3], "--rounds is about pruning in steps"),
        (["--distill", 0.5], "give --finetune EPOCHS, --tune-tokens N or --rewind STEP"),
        (["--finetune", 1, "--temperature", 2], "give --distill WEIGHT"),
        (["--finetune", 1, "--distill", 1.5], "--distill is 1.5"),
        (["--finetune", 1.5], "--finetune is 1.5: write a whole number"),
        (["--finetune", -1], "--finetune is -1.0"),
        (["--rewind", 24], "training has steps 0 to 23"),
        (["--rewind", 99], "keeps no state 99"),
        (["--rewind", 3, "--lr", 0.1], "leave --lr out"),
        (["--schedule", "iterative", "--structure", "2:4"], "2:4 removes 0.5 of every run at once"),
        (["--schedule", "gradual", "--finetune", 1, "--structure", "1:4"], "leave schedule gradual out"),
        (["--dry-run", "--schedule", "iterative"], "--dry-run shows a plan that is made at once"),
    ],
)
def test_wrong_use(scored: Path, cli: Cli, options: list[object], said: str) -> None:
    before = files(scored)
    done = cli("prune", scored, "-c", "magnitude", "-s", 0.5, "--name", "wrong", *options)
    assert done.code == 2, done.err
    assert said in done.err
    assert done.err.count("\n") == 1
    assert files(scored) == before


def test_scores_that_cannot_be_made_again(run: Path, cli: Cli) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["score"]["samples"] = 12
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    asked = ("prune", run, "-c", "taylor", "-s", 0.5, "--name", "again")
    done = cli(*asked, "--schedule", "iterative")
    assert done.code == 1
    assert "samples was 24, is now 12" in done.err
    assert cli(*asked, "--finetune", 1).code == 0  # one round needs no scores but these


def test_imported_models_are_fine_tuned_but_not_rewound(tmp_path: Path, cli: Cli, finished: Path) -> None:
    from safetensors.torch import save_file

    save_file(prunekit.Trajectory(finished / "trajectory").model_state(), tmp_path / "w.safetensors")
    model = (
        "--model",
        "prunekit.models:digits_cnn",
        "--model-args",
        '{"channels": [6, 8, 8]}',
        "--weights",
        tmp_path / "w.safetensors",
    )
    assert cli("import", *model, "--data", "prunekit.data:digits", "--out", tmp_path / "r").code == 0
    assert cli("score", tmp_path / "r", "-c", "magnitude").code == 0
    asked = ("prune", tmp_path / "r", "-c", "magnitude", "-s", 0.5)
    assert cli(*asked, "--name", "a", "--finetune", 1).code == 0
    assert cli("eval", tmp_path / "r" / "pruned" / "a").code == 0
    done = cli(*asked, "--name", "b", "--rewind", 0)
    assert done.code == 2
    assert "was imported" in done.err
    assert cli("import", *model, "--out", tmp_path / "bare").code == 0
    assert cli("score", tmp_path / "bare", "-c", "magnitude").code == 0
    done = cli("prune", tmp_path / "bare", "-c", "magnitude", "-s", 0.5, "--name", "a", "--finetune", 1)
    assert done.code == 1
    assert "has no data" in done.err
    assert cli("prune", tmp_path / "bare", "-c", "magnitude", "-s", 0.5, "--name", "a", "--schedule", "iterative").code == 0
    assert isinstance(prunekit.load(tmp_path / "bare" / "pruned" / "a", small_cnn), type(digits_cnn()))
