"""Every verb from end to end on real digits, and again, and with changed inputs."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prunekit
from prunekit import checkpoint
from prunekit.data import digits
from prunekit.models import digits_cnn
from prunekit.models.digits import DigitsCNN
from prunekit.verbs import training
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import RECIPE, Cli, with_recipe
from tests.interrupt import ctrl_c, trains

CRITERIA = ["influence", "magnitude", "gradient", "taylor", "random"]


def files(folder: Path) -> dict[str, str]:
    """Every file's name and hash, but for the lock."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def small_cnn() -> torch.nn.Module:
    return digits_cnn(channels=[6, 8, 8])


def test_run_leaves_every_artifact(finished: Path) -> None:
    expected = {
        "recipe.yaml", "train.json", "compare.json", "compare.csv", "compare.png", "report.html",
        "reconstruction.safetensors", "timeline.json", "trajectory/trajectory.json", "trajectory/steps.jsonl",
        "trajectory/states-00000.safetensors", "trajectory/fixed.safetensors", "trajectory/start.safetensors",
        "trajectory/rows.safetensors",
        *(f"scores/{c}.safetensors" for c in CRITERIA),
        *(f"pruned/{n}/{f}" for n in ("loose", "small")
          for f in ("model.safetensors", "plan.safetensors", "prunekit.json", "eval.json")),
        "pruned/loose/masks.safetensors",
    }  # fmt: skip
    assert set(files(finished)) == expected


def test_resolved_recipe_says_everything(finished: Path) -> None:
    resolved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert resolved["seed"] == 3
    assert resolved["train"]["schedule"] == {"name": "onecycle", "warmup": 0.2}
    assert resolved["score"]["criteria"] == CRITERIA


def test_comparison_covers_the_grid(finished: Path) -> None:
    comparison = json.loads((finished / "compare.json").read_text())
    cells = {(c["structure"], c["criterion"], c["allocation"], c["sparsity"]) for c in comparison["cells"]}
    assert len(cells) == len(comparison["cells"]) == 2 * 5 * 2 * 8
    rows = list(csv.DictReader((finished / "compare.csv").open()))
    assert len(rows) == len(cells)
    for row, cell in zip(rows, comparison["cells"], strict=True):
        assert float(row["accuracy"]) == cell["accuracy"]
        if cell["structure"] == "unstructured":
            assert cell["achieved"] == pytest.approx(round(cell["sparsity"] * 1062) / 1062)
    assert (finished / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_measures_what_it_says(finished: Path) -> None:
    x, y = digits()["test"]
    for name in ("loose", "small"):
        found = json.loads((finished / "pruned" / name / "eval.json").read_text())
        model = prunekit.load(finished / "pruned" / name, small_cnn)
        with torch.no_grad():
            assert found["pruned"]["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
        assert found["pruned"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert found["pruned"]["nonzero"] == sum(int((p != 0).sum()) for p in model.parameters())
        content = (finished / "pruned" / name / "model.safetensors").read_bytes()
        assert found["pruned"]["bytes"] == len(content)
        assert found["pruned"]["zipped"] == len(zlib.compress(content))
        kernel = found["kernel"]
        for part in ("dense", "pruned"):
            assert len(kernel[part]["mean_error_per_output"]) == 10
            assert kernel[part]["mean_error"] < 0.05 * kernel[part]["mean_output"]
            assert kernel[part]["argmax_agreement"] > 0.9
        assert sum(v["share"] for v in kernel["pruned"]["by_layer"].values()) == pytest.approx(1)
        assert set(found["latency"]["batches"]) == {"1", "64"}
    small = json.loads((finished / "pruned" / "small" / "eval.json").read_text())
    assert small["pruned"]["macs"] < small["dense"]["macs"]
    assert small["pruned"]["bytes"] < small["dense"]["bytes"]


def test_masked_machine_adds_up_the_kept_weights(finished: Path) -> None:
    """(c) of the kernel section against per-weight shares: f_0 + Σ_{i kept} (ψ_i + ψ_i^reg)."""
    from prunekit.kernel import ModelFunction, attribute

    trajectory = prunekit.Trajectory(finished / "trajectory")
    x, y = (t[:4] for t in digits()["test"])
    masks = load_file(finished / "pruned" / "loose" / "masks.safetensors")
    function = ModelFunction(small_cnn(), trajectory.layout, trajectory.fixed)
    total = function(trajectory.state(0), x, y)
    for part in attribute(function, trajectory.segments, x, y, share="whole"):
        for name, signed in part.scores.items():
            total[part.samples] += (signed * masks[name] if name in masks else signed).flatten(2).sum(2)
    from prunekit.kernel import masked_machine

    flat = torch.cat([masks[e.name].flatten() if e.name in masks else torch.ones(e.size) for e in trajectory.layout])
    torch.testing.assert_close(masked_machine(function, trajectory.segments(), flat, x, y), total, atol=1e-3, rtol=1e-3)


def test_second_run_reuses_everything(run: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = files(run)
    done = cli("run", tmp_path / "recipe.yaml", "--out", run)
    assert done.code == 0
    assert done.out.count("reused") == 1 + 5 + 1 + 2 + 2
    after = files(run)
    assert {n for n in before if before[n] != after[n]} <= {"report.html"}


def test_same_recipe_gives_the_same_bits(finished: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "again").code == 0
    assert cli("score", tmp_path / "again", "--criterion", "all").code == 0
    for criterion in CRITERIA:
        one, two = (load_file(f / "scores" / f"{criterion}.safetensors") for f in (finished, tmp_path / "again"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    first, second = (f / "trajectory" / "states-00000.safetensors" for f in (finished, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [("seed: 3", "recipe.seed was 3, is now 4"), ("lr: 0.02", "train.optimizer.lr was 0.02, is now 0.04")],
)
def test_changed_training_is_refused_without_overwrite(run: Path, cli: Cli, tmp_path: Path, change: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(change, change.replace("3", "4").replace("0.02", "0.04")))
    before = files(run)
    done = cli("train", tmp_path / "r.yaml", "--out", run)
    assert done.code == 1
    assert said in done.err
    assert "--overwrite" in done.err
    assert files(run) == before
    assert cli("train", tmp_path / "r.yaml", "--out", run, "--overwrite").code == 0
    stale = cli("prune", run, "--criterion", "magnitude", "--sparsity", 0.5, "--name", "new")
    assert stale.code == 1
    assert "made from trajectory" in stale.err


def test_changed_options_are_refused_without_overwrite(run: Path, cli: Cli) -> None:
    before = files(run)
    for arguments in (
        ("score", run, "--criterion", "influence", "--nodes", 2),
        ("score", run, "--criterion", "random", "--seed", 9),
        ("compare", run, "--sparsity", 0.5),
        ("prune", run, "--criterion", "magnitude", "--sparsity", 0.6, "--name", "loose"),
    ):
        done = cli(*arguments)
        assert done.code == 1, arguments
        assert "--overwrite" in done.err
        assert done.err.count("\n") == 1
    assert files(run) == before
    assert cli("score", run, "--criterion", "random", "--seed", 9, "--overwrite").code == 0
    assert files(run)["scores/random.safetensors"] != before["scores/random.safetensors"]


def test_scores_of_another_run_are_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("seed: 3", "seed: 5"))
    cli("train", tmp_path / "r.yaml", "--out", tmp_path / "other")
    cli("score", tmp_path / "other", "--criterion", "magnitude")
    (run / "scores" / "magnitude.safetensors").write_bytes((tmp_path / "other/scores/magnitude.safetensors").read_bytes())
    theirs, ours = (prunekit.Trajectory(f / "trajectory").hash for f in (tmp_path / "other", run))
    done = cli("prune", run, "--criterion", "magnitude", "--sparsity", 0.5, "--name", "x")
    assert done.code == 1
    assert theirs in done.err
    assert ours in done.err
    plan = run / "pruned" / "loose" / "plan.safetensors"
    done = cli("prune", tmp_path / "other", "--apply", plan, "--name", "x")
    assert done.code == 1
    assert "the plan was made for model" in done.err


def test_a_plan_says_that_training_is_not_in_it(run: Path, cli: Cli) -> None:
    words = ("prune", run, "-c", "magnitude", "-s", 0.5, "--dry-run")
    done = cli(*words, "--name", "trained-later", "--finetune", 1, "--recalibrate")
    assert done.code == 0, done.err
    assert "a plan says no training: give --finetune, --recalibrate to --apply too" in done.out
    assert "no training" not in cli(*words, "--name", "plain").out


def test_plan_can_be_looked_at_edited_and_applied(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "magnitude", "-s", 0.5, "--structure", "channels", "--name", "mine", "--dry-run")
    assert done.code == 0
    assert "conv2" in done.out
    folder = run / "pruned" / "mine"
    assert [p.name for p in folder.iterdir()] == ["plan.safetensors"]
    again = cli("prune", run, "-c", "magnitude", "-s", 0.5, "--structure", "channels", "--name", "mine")
    assert again.code == 1
    assert "--apply" in again.err
    plan = folder / "plan.safetensors"
    with safe_open(plan, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(plan)
    tensors["keep/conv1"][:] = 0
    tensors["keep/conv1"][2] = 1
    save_file(tensors, plan, metadata=metadata)
    done = cli("prune", run, "--apply", plan)
    assert done.code == 0
    assert "edited by hand" in done.out
    assert prunekit.load(folder, small_cnn).conv1.out_channels == 1
    assert cli("eval", folder).code == 0
    assert "reused" in cli("prune", run, "--apply", plan).out
    refused = cli("prune", run, "-c", "magnitude", "-s", 0.5, "--structure", "channels", "--name", "mine")
    assert refused.code == 1
    assert "edited by hand" in refused.err


def test_json_and_quiet(run: Path, cli: Cli) -> None:
    for arguments in (
        ("score", run, "-c", "magnitude"),
        ("compare", run),
        ("prune", run, "-s", 0.5, "--name", "loose", "--no-refine"),
        ("eval", run / "pruned" / "loose"),
        ("report", run),
    ):
        done = cli(*arguments, "--json")
        assert done.code == 0, done.err
        json.loads(done.out)
        quiet = cli(*arguments, "--quiet")
        assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_info_on_every_artifact(run: Path, cli: Cli) -> None:
    kinds = {
        run: "run",
        run / "recipe.yaml": "recipe",
        run / "train.json": "training",
        run / "trajectory": "trajectory",
        run / "scores" / "influence.safetensors": "scores",
        run / "compare.json": "comparison",
        run / "pruned" / "small": "pruned",
        run / "pruned" / "small" / "plan.safetensors": "plan",
        run / "pruned" / "small" / "model.safetensors": "model",
        run / "pruned" / "small" / "eval.json": "evaluation",
    }
    for path, kind in kinds.items():
        done = cli("info", path)
        assert done.code == 0, done.err
        assert f"kind: {kind}\n" in done.out
        assert json.loads(cli("info", path, "--json").out)["kind"] == kind
    assert json.loads(cli("info", run / "scores" / "influence.safetensors", "--json").out)["cost"]["seconds"] > 0


def test_imported_models(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    (tmp_path / "their_module.py").write_text(
        "from prunekit.models import digits_cnn\nfrom prunekit.data import digits\n"
        "def build(width=6): return digits_cnn([width, 8, 8])\ndef data(): return digits()\n"
    )
    monkeypatch.chdir(tmp_path)
    trajectory = prunekit.Trajectory(finished / "trajectory")
    for name, index in (("early", 0), ("late", -1)):
        save_file(trajectory.model_state(index), tmp_path / f"{name}.safetensors")
    one = ("import", "--model", "their_module:build", "--weights", "late.safetensors", "--out", "one")
    assert cli(*one).code == 0
    assert "reused" in cli(*one).out
    assert cli("score", "one", "-c", "magnitude").code == 0
    for criterion, lacks in (("influence", "training path"), ("taylor", "--data")):
        done = cli("score", "one", "-c", criterion)
        assert done.code == 1
        assert lacks in done.err
    assert cli("prune", "one", "-c", "magnitude", "-s", 0.5, "--name", "a").code == 0
    done = cli("import", "--model", "their_module:build", "--data", "their_module:data", "--weights", "early.safetensors",
               "--weights", "late.safetensors", "--out", "two")  # fmt: skip
    assert done.code == 0
    assert "a path of 2 checkpoints" in done.out
    assert cli("score", "two", "-c", "all").code == 0
    assert cli("prune", "two", "-c", "auto", "-s", 0.5, "--structure", "channels", "--name", "a", "--no-refine").code == 0
    assert cli("eval", "two/pruned/a").code == 0
    other = cli("import", "--model", "their_module:build", "--model-args", '{"width": 7}', "--weights",
                "late.safetensors", "--out", "three")  # fmt: skip
    assert other.code == 1
    assert "conv1.bias has shape (6,), the model's is (7,)" in other.err
    assert not (tmp_path / "three" / "trajectory").exists()


@pytest.mark.slow
def test_a_run_folder_is_never_on_the_path(run: Path, tmp_path: Path) -> None:
    (run / "evil.py").write_text("raise SystemExit('code from the run folder ran')\n")
    with_recipe(run, model={"factory": "evil:build", "args": {}})
    for library in ("json", "yaml", "torch", "difflib"):
        (run / f"{library}.py").write_text("raise SystemExit('code from the run folder ran')\n")
    done = subprocess.run(
        [sys.executable, "-m", "prunekit", "score", ".", "-c", "magnitude"], cwd=run, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no module 'evil'" in done.stderr


@pytest.mark.slow
def test_checkout_door_and_version(cli: Cli) -> None:
    door = Path(prunekit.__file__).parents[1] / "cli.py"
    printed = subprocess.run([sys.executable, str(door), "--help"], capture_output=True, text=True, check=True).stdout
    for verb in ("train", "import", "score", "compare", "prune", "eval", "report", "run", "info"):
        assert f"  {verb} " in printed
        assert "Examples:\n" in cli(verb, "--help").out
    assert cli("--version").out == f"prunekit {prunekit.__version__}\n"
    assert cli().code == 0


def test_influence_options_on_the_command_line(run: Path, cli: Cli) -> None:
    for options in (
        ["--share", "survival", "--aggregation", "l2"],
        ["--quadrature", "reconstruction", "--tolerance", 0.05],
        ["--memory", "3MB", "--target", "margin", "--stride", 2],
    ):
        done = cli("score", run, "-c", "influence", *options, "--overwrite", "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)[0]["findings"]
        assert 0 < found["error"]["relative"] < 1
    before = files(run)
    done = cli("score", run, "-c", "influence", "--max-error", 1e-9, "--overwrite")
    assert done.code == 1
    assert "estimated relative error" in done.err
    assert files(run) == before
    for wrong in (["--share", "kernal"], ["--memory", "much"], ["--memory", "1KB"], ["--tolerance", -1]):
        done = cli("score", run, "-c", "influence", *wrong, "--overwrite")
        assert done.code in (1, 2)
        assert done.err.count("\n") == 1
    assert files(run) == before


@pytest.mark.slow
def test_recording_options_of_a_recipe(cli: Cli, tmp_path: Path) -> None:
    for number, record in enumerate(("{every: 4}", "{states: half}", "{second_moments: true, snapshot_every: 0}")):
        (tmp_path / "r.yaml").write_text(RECIPE.replace("epochs: 3", f"epochs: 1, record: {record}"))
        out = tmp_path / f"run{number}"
        assert cli("train", tmp_path / "r.yaml", "--out", out, "--quiet").code == 0
        assert cli("score", out, "-c", "influence", "--quiet").code == 0
        assert cli("prune", out, "-c", "influence", "-s", 0.5, "--name", "a", "--quiet").code == 0
        assert cli("eval", out / "pruned" / "a", "--quiet").code == 0


def test_training_that_was_cut_off_goes_on(cli: Cli, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("epochs: 3", "epochs: 3, watch: {every: 1}, record: {snapshot_every: 5}"))
    with ctrl_c(DigitsCNN, trains, call=17):
        assert cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run").code == 130
    assert not (tmp_path / "run" / "trajectory").exists()
    done = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert done.code == 0
    assert "goes on after step 10" in done.err, done.err
    resumed, whole = (prunekit.Trajectory(f / "trajectory") for f in (tmp_path / "run", finished))
    assert resumed.hash == whole.hash
    assert not (tmp_path / "run" / "trajectory.partial").exists()
    assert cli("train", tmp_path / "r.yaml", "--out", tmp_path / "whole").code == 0
    told = [checkpoint.read_json(tmp_path / name / "train.json") | {"cost": None} for name in ("run", "whole")]
    assert told[0] == told[1]
    assert len(told[0]["losses"]) == len(told[0]["accuracies"]) == 3


def test_training_that_was_cut_off_while_it_is_measured_goes_on(
    cli: Cli, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are taken by then, and a finished recording could not be gone on with: it would be made anew."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("epochs: 3", "epochs: 3, record: {snapshot_every: 5}"))

    def cut_off(*given: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_figure", cut_off)
        assert cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run").code == 130
    done = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    last = 5 * ((len(prunekit.Trajectory(finished / "trajectory")) - 1) // 5)
    assert f"goes on after step {last}" in done.err, done.err
    assert prunekit.Trajectory(tmp_path / "run" / "trajectory").hash == prunekit.Trajectory(finished / "trajectory").hash


def test_ratios_and_floor_on_the_command_line(run: Path, cli: Cli) -> None:
    done = cli(
        "prune", run, "-c", "magnitude", "-s", 0.6, "--ratio", "conv1.*=0.25", "--floor", 0.2, "--name", "fixed", "--json",
        "--allocation", "mean",
    )  # fmt: skip
    assert done.code == 0, done.err
    layers = json.loads(done.out)["layers"]
    total = sum(c["total"] for c in layers.values())
    assert total - sum(c["kept"] for c in layers.values()) == round(0.6 * total)
    assert layers["conv1.weight"]["kept"] == layers["conv1.weight"]["total"] - round(0.25 * layers["conv1.weight"]["total"])
    assert all(c["kept"] >= 0.2 * c["total"] for c in layers.values())
    for wrong, said in (
        ("conv1.*", "write PATTERN=SHARE"),
        ("conv9.*=0.5", "matches no layer"),
        ("conv1.*=2", "--ratio conv1.* is 2.0"),
    ):
        done = cli("prune", run, "-c", "magnitude", "-s", 0.6, "--ratio", wrong, "--name", "wrong")
        assert done.code == 2
        assert said in done.err
    assert cli("prune", run, "-c", "magnitude", "-s", 0.6, "--ratio", "a=0.1", "--ratio", "a=0.2").code == 2
    assert not (run / "pruned" / "wrong").exists()


@pytest.mark.usefixtures("drawn")
def test_sensitivity_prunes_one_layer_at_a_time(run: Path, cli: Cli) -> None:
    done = cli("sensitivity", run, "-c", "magnitude", "--sparsity", 0, "--sparsity", 0.5, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    cells = {(c["layer"], c["sparsity"]): c for c in found["cells"]}
    assert set(cells) == {(layer, s) for layer in ("conv1.weight", "conv2.weight", "conv3.weight") for s in (0.0, 0.5)}
    assert all(cells[layer, 0.0]["accuracy"] == found["dense"]["accuracy"] for layer, _ in cells)
    # by hand: the smaller half of conv2's weights to zero
    opened = Run(run)
    model, weight = opened.model, opened.model.get_parameter("conv2.weight")
    threshold = weight.detach().abs().flatten().sort().values[weight.numel() // 2]
    with torch.no_grad():
        weight[weight.abs() < threshold] = 0
        hits = [(model(x).argmax(1) == y).float() for x, y in opened.batches("validation")]
    assert cells["conv2.weight", 0.5]["accuracy"] == pytest.approx(float(torch.cat(hits).mean()))
    lines = (run / "sensitivity-unstructured.csv").read_text().splitlines()
    assert lines[0] == "layer,sparsity,removed,accuracy,agreement,kl"
    assert len(lines) == 1 + len(cells)
    assert (run / "sensitivity-unstructured.png").read_bytes().startswith(b"\x89PNG")
    assert "reused" in cli("sensitivity", run, "-c", "magnitude", "--sparsity", 0, "--sparsity", 0.5).out
    assert cli("sensitivity", run, "-c", "magnitude", "--sparsity", 0.3).code == 1
    done = cli("sensitivity", run, "-c", "magnitude", "--structure", "channels", "--sparsity", 0.5)
    assert done.code == 0, done.err
