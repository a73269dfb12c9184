"""prune --refine and --squeeze from end to end: files, manifest, reuse, report, bad input."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import prunekit
from prunekit import Plan, UsageError, checkpoint
from prunekit.data import digits
from prunekit.measure import merit as merit_of
from prunekit.models.digits import DigitsCNN
from prunekit.recipe import Prune
from prunekit.task import Classification
from prunekit.verbs import refining as verbs_refining
from prunekit.verbs.comparing import compare_run
from prunekit.verbs.pruning import prune_run
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import RECIPE, Cli
from tests.cli.test_bad_input import one_line
from tests.cli.test_pipeline import small_cnn
from tests.interrupt import ctrl_c, repairs
from tests.reference import fidelity, predict

pytestmark = pytest.mark.usefixtures("short")


def pruned(cli: Cli, run: Path, name: str, *more: object) -> dict:
    done = cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", name, "--json", *more)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_refined_model_is_written_measured_and_explained(cli: Cli, run: Path) -> None:
    plain = pruned(cli, run, "plain")
    better = pruned(cli, run, "better", "--refine")
    assert better["refine"]["after"]["accept"] < better["refine"]["before"]["accept"]
    assert better["refine"]["ended"] == "done"
    assert better["achieved"] == plain["achieved"]
    plan = Plan.load(run / "pruned" / "better" / "plan.safetensors")
    assert plan.history[0]["stage"] == "given"
    assert load_file(run / "pruned" / "better" / "masks.safetensors").keys() == plan.keep.keys()
    x, _ = digits()["test"]
    model = prunekit.load(run / "pruned" / "better", small_cnn)
    for name, mask in plan.masks().items():
        assert not model.get_parameter(name)[~mask].any()
    again = pruned(cli, run, "better", "--refine")
    assert again["reused"]
    assert again["refine"] == better["refine"]
    measured = cli("eval", run / "pruned" / "better", "--json")
    found = json.loads(measured.out)
    assert found["refine"]["rounds"][-1]["accept"] == better["refine"]["after"]["accept"]
    base = json.loads(cli("eval", run / "pruned" / "plain", "--json").out)
    assert base["refine"] is None
    assert found["pruned"]["kl"] < base["pruned"]["kl"]
    assert torch.isfinite(model(x)).all()
    assert cli("report", run).code == 0
    report = (run / "report.html").read_text()
    assert "the repair, round by round" in report
    assert report.count("What came back, and the samples that asked for it") == 1
    told = json.loads(cli("explain", run / "pruned" / "better", "--nodes", 2, "--json").out)
    sizes = better["refine"]["samples"]
    assert told["samples"] == sizes["accept"]
    for when, mask in (("before", told["before"]), ("after", told["after"])):
        mean = better["refine"][when]["accept"]
        assert mask["divergence"] == pytest.approx(mean, rel=1e-3, abs=1e-8)
        assert sum(row["blame"] for row in mask["classes"]) + mask["residual"] == pytest.approx(mean, rel=1e-3, abs=1e-8)
    assert told["moved"]["back"] == told["moved"]["out"] == better["refine"]["changed"]
    assert told["refine"]["history"] == plan.history
    shown = cli("explain", run / "pruned" / "better", "--nodes", 2)
    assert "asked for by (label)" in shown.out
    page = (run / "explain" / "pruned-better.html").read_text()
    assert page.count('aria-label="Samples that blame it most') == len(told["units"]) > 0
    two = json.loads(cli("explain", run, "diff", "plain", "better", "--nodes", 2, "--json").out)
    assert [mask["alone"] for mask in two["masks"]] == [better["refine"]["changed"]] * 2
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "better"), 1, "refine was")
    shown = cli("info", run / "pruned" / "better")
    assert "entries" in shown.out
    assert cli("prune", run, "-c", "magnitude", "-s", 0.7, "--name", "better", "--overwrite").code == 0, "eval's files go with it"


def test_channels_can_be_refined_and_a_plan_alone(cli: Cli, run: Path) -> None:
    found = pruned(cli, run, "narrow", "--structure", "channels", "--refine")
    assert found["refine"]["after"]["accept"] <= found["refine"]["before"]["accept"]
    dry = pruned(cli, run, "dry", "--refine", "--refine-budget", "0s", "--dry-run")
    assert dry["dry_run"]
    assert dry["refine"]["ended"] == "budget"
    shown = cli("prune", run, "--apply", run / "pruned" / "dry" / "plan.safetensors")
    assert shown.code == 0
    assert "until the budget was spent" in shown.out


def test_a_squeezed_model_loads_and_is_measured(cli: Cli, run: Path) -> None:
    done = cli("prune", run, "-c", "magnitude", "-s", 0.97, "--name", "tight", "--refine", "--squeeze")
    assert done.code == 0, done.err
    assert "squeezed: channels taken out: " in done.out
    folder = run / "pruned" / "tight"
    manifest = json.loads((folder / "prunekit.json").read_text())
    assert sum(manifest["facts"]["squeezed"]["removed"].values()) > 0
    plan = Plan.load(folder / "plan.safetensors")
    x, y = digits()["test"]
    model = prunekit.load(folder, small_cnn)
    dense = prunekit.load(run / "pruned" / "loose", small_cnn)  # the factory's shapes; weights below
    full = prunekit.Trajectory(run / "trajectory")
    dense.load_state_dict(full.layout.views(full.state(-1)))
    masked = prunekit.masked(dense, plan)
    torch.testing.assert_close(model(x), masked(x), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())
    masks = load_file(folder / "masks.safetensors")
    assert all(model.get_parameter(n).shape == m.shape for n, m in masks.items())
    found = json.loads(cli("eval", folder, "--json").out)
    with torch.no_grad():
        assert found["pruned"]["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert found["kernel"]["pruned"]["mean_error"] < 0.1


@pytest.mark.parametrize("more", [(), pytest.param(("--compensate",), marks=pytest.mark.exhaustive)])
def test_eval_measures_a_squeezed_model_before_and_after(cli: Cli, run: Path, more: tuple[str, ...]) -> None:
    """The masked figures are those of the same pruning without --squeeze: a file of the dense model's shapes."""
    asked = ("prune", run, "-c", "magnitude", "-s", 0.97, *more)
    for name, options in (("masked", ()), ("tight", ("--squeeze",))):
        assert cli(*asked, "--name", name, *options).code == 0
    found = json.loads(cli("eval", run / "pruned" / "tight", "--json").out)
    base = json.loads(cli("eval", run / "pruned" / "masked", "--json").out)
    before, after = found["masked"], found["pruned"]
    for key in ("parameters", "nonzero", "macs", "accuracy", "agreement", "kl"):
        assert before[key] == pytest.approx(base["pruned"][key], abs=1e-9), key
    assert abs(before["bytes"] - (run / "pruned" / "masked" / "model.safetensors").stat().st_size) <= 8  # the plan's own digest
    assert before["accuracy"] == after["accuracy"]
    assert before["kl"] == pytest.approx(after["kl"], abs=1e-4)
    for key in ("parameters", "macs", "bytes"):
        assert after[key] < before[key]
    assert base["latency"]["batches"].keys() == found["latency"]["batches"].keys()
    for times in found["latency"]["batches"].values():
        assert min(times["dense_ms"], times["masked_ms"], times["pruned_ms"]) > 0
        assert times["ratio"] == times["pruned_ms"] / times["dense_ms"]
    assert "masked" not in base
    assert all("masked_ms" not in times for times in base["latency"]["batches"].values())
    shown = cli("eval", run / "pruned" / "tight").out
    assert "before squeezing" in shown
    assert f"{before['parameters']:,}" in shown
    assert "before squeezing" not in cli("eval", run / "pruned" / "masked").out
    assert cli("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "tight: before and after squeezing" in page
    assert "masked: before and after squeezing" not in page
    for key in ("parameters", "macs", "bytes"):
        cells = "".join(f"<td>{found[part][key]:,}</td>" for part in ("dense", "masked", "pruned"))
        assert cells in page, key
    for times in found["latency"]["batches"].values():
        assert "".join(f"<td>{times[f'{part}_ms']:.2f}</td>" for part in ("dense", "masked", "pruned")) in page


def test_an_evaluation_without_the_figures_before_squeezing_is_made_anew(cli: Cli, run: Path) -> None:
    """As prunekit wrote it before it measured them; one that is damaged is refused."""
    assert cli("prune", run, "-c", "magnitude", "-s", 0.97, "--name", "tight", "--squeeze").code == 0
    folder = run / "pruned" / "tight"
    found = json.loads(cli("eval", folder, "--json").out)
    old = {key: value for key, value in found.items() if key not in ("masked", "reused")}
    for times in old["latency"]["batches"].values():
        del times["masked_ms"]
    checkpoint.write_json(folder / "eval.json", old)
    assert cli("report", run).code == 0
    assert "before and after squeezing" not in (run / "report.html").read_text()
    again = json.loads(cli("eval", folder, "--json").out)
    assert not again["reused"]
    assert again["masked"] == found["masked"]
    assert json.loads(cli("eval", folder, "--json").out)["reused"]
    checkpoint.write_json(folder / "eval.json", {**old, "masked": found["masked"]})
    one_line(cli("eval", folder), 1, "eval.json", "masked_ms is None; it must be a number", "--overwrite")


def test_a_refined_plan_is_compensated_within_its_budget_or_fine_tuned(cli: Cli, run: Path) -> None:
    def made(name: str, *more: object) -> tuple[dict, Plan, dict]:
        done = cli("prune", run, "-c", "magnitude", "--max-params", 700, "--refine", "--name", name, "--json", *more)
        assert done.code == 0, done.err
        folder = run / "pruned" / name
        return json.loads(done.out), Plan.load(folder / "plan.safetensors"), load_file(folder / "model.safetensors")

    facts, plan, weights = made("refined")
    assert facts["refine"]["changed"] > 0
    compensated = made("compensated", "--compensate")
    tuned = made("tuned", "--finetune", 1)
    for other in (compensated, tuned):
        assert all(torch.equal(other[1].keep[n], k) for n, k in plan.keep.items())
        assert other[0]["refine"]["after"] == facts["refine"]["after"]
        assert any(not torch.equal(other[2][n], weights[n]) for n in plan.keep)
        assert all(not other[2][n][~k].any() for n, k in plan.keep.items())
        left = sum(v.numel() for v in weights.values()) - sum(int((~k).sum()) for k in plan.keep.values())
        assert left <= 700
        assert other[0]["reached"] == left
    assert compensated[0]["compensated"]
    assert tuned[0]["finetune"]["epochs"] == 1
    assert cli("prune", run, "-c", "magnitude", "--max-params", 700, "--refine", "--name", "tuned", "--finetune", 1).code == 0
    found = json.loads(cli("eval", run / "pruned" / "tuned", "--json").out)
    assert found["refine"]["rounds"]


@pytest.mark.slow
def test_an_accuracy_budget_is_searched_with_refined_plans(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "r.yaml").write_text(RECIPE.replace("lr: 0.02", "lr: 0.01").replace("epochs: 3", "epochs: 15"))  # it has learnt
    assert cli("train", tmp_path / "r.yaml", "--out", run).code == 0
    assert cli("score", run, "--criterion", "magnitude").code == 0
    opened = Run(run)
    wanted = {"criterion": "magnitude", "max_accuracy_drop": 8}
    refining = {"refine": {"rounds": 6, "learn": False, "samples": 256}}
    plain = prune_run(opened, Prune.of({**wanted, "name": "plain"}, "test"))
    better = prune_run(opened, Prune.of({**wanted, **refining, "name": "better"}, "test"))
    assert better["achieved"] > plain["achieved"]
    assert better["reached"] + better["standard_error"] <= 8
    x, y = zip(*opened.batches("validation"), strict=True)
    with torch.no_grad():
        dense, small = (float((m(torch.cat(x)).argmax(1) == torch.cat(y)).double().mean())
                        for m in (opened.model, prunekit.load(run / "pruned" / "better", small_cnn)))  # fmt: skip
    assert 100 * (dense - small) == pytest.approx(better["reached"], abs=1e-3)


@pytest.mark.parametrize(
    ("structure", "steps"),
    [
        ("unstructured", ("--schedule", "iterative", "--rounds", 3)),
        ("channels", ("--schedule", "iterative", "--rounds", 2, "--finetune", 1)),
        ("unstructured", ("--schedule", "gradual", "--rounds", 2, "--finetune", 1)),
    ],
)
def test_every_round_of_a_schedule_is_refined(cli: Cli, run: Path, structure: str, steps: tuple[object, ...]) -> None:
    asked = (*steps, "--structure", structure)
    plain = pruned(cli, run, "plain", *asked)
    found = pruned(cli, run, "better", *asked, "--refine")
    assert found["achieved"] == pytest.approx(plain["achieved"], abs=0 if structure == "unstructured" else 0.05)
    assert len(found["rounds"]) == len(plain["rounds"])
    for told, unrefined in zip(found["rounds"], plain["rounds"], strict=True):
        assert told["refined"]["after"]["accept"] <= told["refined"]["before"]["accept"]
        assert told["refined"]["ended"] == "done"
        if structure == "unstructured":
            assert told["sparsity"] == unrefined["sparsity"]
        assert "refined" not in unrefined
    assert any(told["refined"]["changed"] for told in found["rounds"])
    plan = Plan.load(run / "pruned" / "better" / "plan.safetensors")
    assert plan.provenance["refine"]["after"] == found["rounds"][-1]["refined"]["after"]
    model = prunekit.load(run / "pruned" / "better", small_cnn)
    if structure == "unstructured":
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in plan.masks().items())
    again = cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "better", *asked, "--refine")
    assert "(unchanged, reused)" in again.out
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "better", *asked), 1, "refine was")
    if structure == "channels":
        assert cli("eval", run / "pruned" / "better").code == 0
    shown = cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "shown", *asked, "--refine").out
    assert shown.count(", divergence ") == len(found["rounds"])
    files = [load_file(run / "pruned" / name / "model.safetensors") for name in ("better", "shown")]
    assert all(torch.equal(files[0][name], tensor) for name, tensor in files[1].items())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("structure", "steps"),
    [
        pytest.param("channels", (), marks=pytest.mark.exhaustive),
        ("unstructured", ("--schedule", "iterative", "--rounds", 2)),
    ],
)
def test_what_was_fine_tuned_is_refined_again(cli: Cli, run: Path, structure: str, steps: tuple[object, ...]) -> None:
    asked = ("--structure", structure, *steps, "--finetune", 2)
    once = pruned(cli, run, "once", *asked, "--refine")
    found = pruned(cli, run, "again", *asked, "--refine-again", 2)
    folder = run / "pruned" / "again"
    plan = Plan.load(folder / "plan.safetensors")
    if structure == "unstructured":
        assert found["achieved"] == once["achieved"]
    given, last = (p.sparsity()["prunable"] for p in (Plan.load(run / "pruned/once/plan.safetensors").before, plan))
    assert last >= given
    assert found["refine"] == once["refine"]  # what was before fine-tuning is told as before
    rounds = found["rounds"][len(once["rounds"]) :]
    assert [told["again"] for told in rounds] == [1, 2]
    assert [told["refined"]["after"] for told in rounds] == [facts["after"] for facts in found["refined_again"]]
    assert all(told["refined"]["after"]["accept"] <= told["refined"]["before"]["accept"] for told in rounds)
    assert found["finetune"]["steps"] == sum(told["steps"] for told in found["rounds"])
    assert found["schedule"]["rounds"] == len(once["rounds"])
    if structure == "unstructured":
        assert any(told["refined"]["changed"] for told in rounds)
        weights = load_file(folder / "model.safetensors")
        assert all(not weights[name][~mask].any() for name, mask in plan.masks().items())
    again = cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "again", *asked, "--refine-again", 2)
    assert "(unchanged, reused)" in again.out
    assert again.out.count("refined again after fine-tuning (") == 2
    changed = ("--name", "again", *asked, "--refine-again", 1)
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, *changed), 1, "refine.again was 2, is now 1")
    measured = json.loads(cli("eval", folder, "--json").out)
    assert [each["after"] for each in measured["refine"]["again"]] == [facts["after"] for facts in found["refined_again"]]
    pruned_kernel = measured["kernel"]["pruned"]
    assert pruned_kernel["by_layer_residual"] < 0.02 * max(pruned_kernel["mean_change"], 1e-3)
    assert pruned_kernel["argmax_agreement"] > 0.9
    told = json.loads(cli("explain", folder, "--nodes", 2, "--json").out)
    assert told["refined_again"] == 2
    assert "refined again after fine-tuning" in cli("explain", folder, "--nodes", 2).out
    assert cli("explain", run, "diff", "again", "--samples", 8, "--nodes", 2).code == 0
    facts = json.loads(cli("info", folder / "plan.safetensors", "--json").out)["made_from"]
    lengths = [len(each["history"]) for each in plan.provenance["refine_again"]]
    assert [each["history"] for each in facts["refine_again"]] == [f"{length} entries" for length in lengths]
    assert cli("report", run).code == 0
    assert (run / "report.html").read_text().count("Refined again after fine-tuning (") == 2


def test_schedules_refine_what_auto_chose_only_when_asked(cli: Cli, run: Path) -> None:
    """With --refine-budget alone every round is tried, and what is better on validation data is kept."""
    steps = ("-s", 0.8, "--schedule", "iterative", "--rounds", 2)
    assert by_auto(cli, run, "plain", *steps)[0]["refine_tried"] is None
    tried = by_auto(cli, run, "tried", *steps, "--refine-budget", "60s")[0]
    assert tried["refine_tried"]["kept"] == (merit(tried["refine_tried"]["refined"]) > merit(tried["refine_tried"]["unrefined"]))
    assert merits(run, "tried") == pytest.approx(
        tried["refine_tried"]["refined" if tried["refine_tried"]["kept"] else "unrefined"], abs=1e-6
    )


@pytest.mark.parametrize("structure", ["2:4", "block:2x2"])
def test_patterns_are_refined_and_squeezed(cli: Cli, run: Path, structure: str) -> None:
    share = () if structure == "2:4" else ("-s", 0.9)
    done = cli(
        "prune", run, "-c", "magnitude", "--structure", structure, *share, "--refine", "--squeeze", "--name", "p", "--json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["refine"]["after"]["accept"] < found["refine"]["before"]["accept"]
    assert found["squeezed"] is not None
    assert cli("eval", run / "pruned" / "p").code == 0


@pytest.mark.slow
def test_recipes_can_ask_for_it(cli: Cli, tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe["train"]["epochs"] = 1
    recipe["score"]["criteria"] = ["magnitude"]
    recipe["compare"] = {"sparsities": [0.9], "structures": ["unstructured"]}
    recipe["prune"] = [
        {
            "name": "a",
            "criterion": "magnitude",
            "sparsity": 0.9,
            "refine": {"rounds": 2, "learn": False, "samples": 100},
            "squeeze": True,
        },
        {"name": "b", "criterion": "magnitude", "sparsity": 0.9, "refine": False},
        {"name": "c", "sparsity": 0.9},
        {"name": "d", "sparsity": 0.9, "refine": False},
    ]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("run", tmp_path / "r.yaml", "--out", tmp_path / "run", "--json", "--quiet")
    assert done.code == 0, done.err
    first, second, tried, plain = json.loads(done.out)["prune"]
    assert first["refine"]["samples"] == {"learn": 100, "accept": 24}  # of the training data; the scoring samples
    assert second["refine"] is None
    assert second["squeezed"] is None
    assert tried["refine_tried"]["refined"]
    assert plain["refine"] is plain["refine_tried"] is None
    assert cli("run", tmp_path / "r.yaml", "--out", tmp_path / "run").out.count("prune: ") == 4  # and nothing was refused
    history = Plan.load(tmp_path / "run" / "pruned" / "a" / "plan.safetensors").history
    assert {e["stage"] for e in history} == {"given", "refine"}


def test_compare_has_a_line_of_refined_plans(cli: Cli, run: Path) -> None:
    grid = ("--sparsity", 0.8, "--sparsity", 0.9, "--structure", "unstructured", "--overwrite")
    plain = json.loads(cli("compare", run, *grid, "--json").out)
    assert {c["repair"] for c in plain["cells"]} == {""}
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("  refine: null", "  refine: {sparsities: [0.9], learn: false}", 1)
    )
    one_line(cli("compare", run, *grid[:-1]), 1, "refine was None")
    done = cli("compare", run, *grid)
    assert done.code == 0, done.err
    assert done.out.count("\nrefined    of the best ") == 1
    found = json.loads((run / "compare.json").read_text())
    *others, line = found["cells"]
    assert others == plain["cells"]
    assert (line["repair"], line["sparsity"]) == ("refined", 0.9)
    best = max((c for c in others if c["sparsity"] == 0.9), key=lambda c: (c["accuracy"], c["agreement"], -c["kl"]))
    assert (line["criterion"], line["allocation"]) == (best["criterion"], best["allocation"])
    assert line["kl"] < best["kl"]
    rows = list(csv.DictReader((run / "compare.csv").open()))
    assert [row["repair"] for row in rows] == [c["repair"] for c in found["cells"]]
    auto = cli("prune", run, "-s", 0.9, "--name", "chosen", "--json")
    assert (json.loads(auto.out)["criterion"], json.loads(auto.out)["allocation"]) == (best["criterion"], best["allocation"])
    assert cli("report", run).code == 0
    assert "<td>refined</td><td>of the best</td>" in (run / "report.html").read_text()
    # the same options give the plan that the line was measured with
    same = prune_run(Run(run), Prune.of({"name": "same", "sparsity": 0.9, "refine": {"learn": False}}, "test"))
    assert same["validation_accuracy"] == pytest.approx(line["accuracy"])
    everywhere = json.loads(cli("compare", run, *grid, "--refine", "--sparsity", 0.5, "--json").out)["cells"]
    assert [c["sparsity"] for c in everywhere if c["repair"]] == [0.9]
    without = json.loads(cli("compare", run, *grid, "--no-refine", "--json").out)
    assert without["cells"] == plain["cells"]


def test_ctrl_c_ends_a_comparison(run: Path) -> None:
    before = (run / "compare.json").read_bytes()
    with ctrl_c(DigitsCNN, repairs, call=9), pytest.raises(KeyboardInterrupt):
        compare_run(Run(run), True, ["unstructured"], ["global"], [0.9], True)
    assert (run / "compare.json").read_bytes() == before


def by_auto(cli: Cli, run: Path, name: str, *more: object) -> tuple[dict, Plan, str]:
    """What prune --criterion auto said, the plan it wrote, and what it prints when it is asked again."""
    asked = ("prune", run, "--name", name, *more)
    done = cli(*asked, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["by_auto"]
    again = cli(*asked)
    assert again.code == 0, again.err
    assert "(unchanged, reused)" in again.out
    assert json.loads(cli(*asked, "--json").out)["refine_tried"] == found["refine_tried"]
    return found, Plan.load(run / "pruned" / name / "plan.safetensors"), again.out


def merits(run: Path, name: str) -> dict[str, float]:
    """Fidelity on validation data of the model that was written."""
    opened = Run(run)
    dense, labels = predict(opened.model, opened.batches("validation"))
    outputs, _ = predict(prunekit.load(run / "pruned" / name, small_cnn), opened.batches("validation"))
    return fidelity(outputs, labels, dense)


@pytest.mark.parametrize(
    "options",
    [
        ("-s", 0.8),
        ("--structure", "2:4"),
        pytest.param(("-s", 0.6, "--structure", "channels", "--compensate"), marks=pytest.mark.exhaustive),
    ],
)
def test_auto_takes_the_better_of_refined_and_unrefined_on_validation_data(
    cli: Cli, run: Path, options: tuple[object, ...]
) -> None:
    """Of the models as they are written: figures in the result are those of the files, also after compensation."""
    plain, unrefined, said = by_auto(cli, run, "plain", *options, "--no-refine")
    assert plain["refine"] is plain["refine_tried"] is None
    assert "refine" not in said
    found, plan, said = by_auto(cli, run, "tried", *options)
    tried = found["refine_tried"]
    assert tried["unrefined"] == pytest.approx(merits(run, "plain"), abs=1e-6)
    assert tried["kept"] == (merit(tried["refined"]) > merit(tried["unrefined"]))
    assert merits(run, "tried") == pytest.approx(tried["refined" if tried["kept"] else "unrefined"], abs=1e-6)
    assert (found["refine"] is not None) == tried["kept"]
    assert found["achieved"] == plain["achieved"]
    same = all(torch.equal(unrefined.keep[name], keep) for name, keep in plan.keep.items())
    assert same == (not tried["kept"])
    assert ("refine tried: taken" if tried["kept"] else "refine tried: not taken") in said
    done = cli("prune", run, "--name", "tried", *options, "--no-refine")
    one_line(done, 1, "refine was", "--overwrite")


def test_auto_keeps_the_unrefined_plan_where_the_refined_one_is_no_better(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(plan: Plan, *_: object, **__: object) -> Plan:
        """Everything that stays is in the first layer's place: nobody's idea of a better plan."""
        count = sum(int(k.sum()) for k in plan.keep.values())
        flat = torch.arange(sum(k.numel() for k in plan.keep.values())) < count
        parts = flat.split([k.numel() for k in plan.keep.values()])
        keep = {name: part.view(plan.keep[name].shape) for (name, part) in zip(plan.keep, parts, strict=True)}
        return replace(plan, keep=keep, provenance={**plan.provenance, "refine": {"ended": "done"}})

    monkeypatch.setattr(verbs_refining, "refine", worse)
    found, plan, said = by_auto(cli, run, "same", "-s", 0.5)
    assert not found["refine_tried"]["kept"]
    assert found["refine"] is None
    assert plan.history == []
    assert merits(run, "same") == pytest.approx(found["refine_tried"]["unrefined"], abs=1e-6)
    assert "refine tried: not taken, no better on validation data" in said


def test_auto_says_why_it_did_not_try_to_refine(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, said = by_auto(cli, run, "whole", "-s", 0)
    assert found["refine"] is None
    assert found["refine_tried"] == {"kept": False, "why": "nothing is removed"}
    assert "refine not tried: nothing is removed" in said

    def refused(*_: object, **__: object) -> Plan:
        raise UsageError("refine: such plans cannot be refined")

    monkeypatch.setattr(verbs_refining, "refine", refused)
    found, _, said = by_auto(cli, run, "refused", "-s", 0.5)
    assert found["refine_tried"] == {"kept": False, "why": "such plans cannot be refined"}
    assert found["achieved"] == 0.5
    one_line(cli("prune", run, "-s", 0.5, "--name", "asked", "--refine"), 2, "such plans cannot be refined")


def test_auto_refines_unasked_where_one_plan_is_made(cli: Cli, run: Path) -> None:
    """Not in schedules and searches over many plans, not for a named criterion, nor where fine-tuning follows."""
    searched = by_auto(cli, run, "searched", "--max-drop", 60)[0]
    in_steps = by_auto(cli, run, "steps", "-s", 0.5, "--schedule", "iterative", "--rounds", 2)[0]
    assert searched["refine_tried"] is in_steps["refine_tried"] is None
    assert pruned(cli, run, "named")["refine_tried"] is None
    forced = by_auto(cli, run, "forced", "-s", 0.8, "--refine")[0]
    assert forced["refine"] is not None
    assert forced["refine_tried"] is None  # it was asked for, so nothing is chosen
    by_size, plan, _ = by_auto(cli, run, "sized", "--max-params", 700)
    assert by_size["refine_tried"]["refined"]
    assert by_auto(cli, run, "tuned", "--max-params", 700, "--finetune", 1)[0]["refine_tried"] is None
    tried, held, _ = by_auto(cli, run, "held", "--max-params", 700, "--finetune", 1, "--refine-budget", "60s")
    assert tried["refine_tried"] == by_size["refine_tried"]  # fine-tuned models hold the tried masks
    assert all(torch.equal(held.keep[n], k) for n, k in plan.keep.items())


def test_the_budget_of_a_try_can_be_set(cli: Cli, run: Path) -> None:
    why = "the budget of 0s was spent before there was a mask to try"
    found, plan, said = by_auto(cli, run, "hurried", "-s", 0.8, "--refine-budget", "0s")
    assert found["refine"] is None
    assert found["refine_tried"] == {"kept": False, "why": why}
    assert plan.provenance["request"]["refine"]["budget"] == "0s"
    assert plan.provenance["request"]["refine"]["when"] == "better"
    assert f"refine not tried: {why}" in said
    one_line(cli("prune", run, "--name", "hurried", "-s", 0.8), 1, "refine.budget was '0s', is now '60s'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-c", "magnitude", "-s", 0.5, "--refine-budget", "60s"), "--refine-budget without --refine"),
        (("-s", 0.5, "--no-refine", "--refine-budget", "60s"), "--refine-budget with --no-refine"),
        (("-s", 0.5, "--no-refine", "--refine-again", 1), "--refine-again with --no-refine"),
        (("-s", 0.5, "--refine-again", 1), "give finetune"),
        (("-s", 0.5, "--refine-again", 1, "--rewind", 3), "rewinding from early ones"),
        (("-s", 0.5, "--refine-again", 1, "--schedule", "gradual", "--finetune", 1), "not gradual"),
        (("-s", 0.5, "--refine-again", 1, "--finetune", 1, "--dry-run"), "--dry-run shows a plan"),
        (("--max-accuracy-drop", 1, "--refine-again", 1, "--finetune", 1), "for a given size"),
        (("--apply", "plan.safetensors", "--finetune", 1, "--refine-again", 1), "--apply takes a finished plan"),
        (("-s", 0.5, "--refine-budget", "soon"), "'soon' is no length of time"),
        (("--apply", "plan.safetensors", "--refine-budget", "60s"), "--apply takes a finished plan"),
        (("-s", 0.5, "--refine", "--refine-budget", "soon"), "'soon' is no length of time"),
        (("-s", 0.5, "--structure", "channels", "--squeeze"), "squeeze is for plans of masks"),
        (("--apply", "plan.safetensors", "--refine"), "--apply takes a finished plan"),
        (("-s", 0.5, "--squeeze", "--finetune", 1), "squeeze is for pruning at once"),
    ],
)
def test_wrong_use(cli: Cli, finished: Path, arguments: tuple[object, ...], said: str) -> None:
    one_line(cli("prune", finished, *arguments), 2, said)


@pytest.mark.parametrize(
    ("refine", "said"),
    [
        ({"round": 3}, "did you mean rounds"),
        ({"budget": "later"}, "no length of time"),
        ({"target": "kll"}, "did you mean kl"),
        ({"rounds": -1}, "rounds is -1"),
    ],
)
def test_bad_recipes(cli: Cli, tmp_path: Path, refine: dict, said: str) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe["prune"][0]["refine"] = refine
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run"), 2, "prune.0.refine", said)
    recipe = {**yaml.safe_load(RECIPE), "compare": {"refine": refine}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run"), 2, "compare.refine", said)


def test_when_is_for_pruned_models(cli: Cli, tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe["prune"][0]["refine"] = {"when": "often"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run"), 2, "prune.0.refine.when is 'often'")
    recipe = {**yaml.safe_load(RECIPE), "compare": {"refine": {"when": "better"}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run"), 2, "compare.refine.when is not a recipe key")


def test_a_line_is_refined_where_something_is_compared(cli: Cli, tmp_path: Path) -> None:
    recipe = {**yaml.safe_load(RECIPE), "compare": {"sparsities": [0.5], "refine": {"sparsities": [0.6]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run"), 2, "refine.sparsities has 0.6")


def test_ctrl_c_ends_a_schedule_and_an_interrupted_model_is_not_reused(cli: Cli, run: Path) -> None:
    asked = ("prune", run, "-c", "magnitude", "-s", 0.8, "--name")
    for name, more in (
        ("steps", ("--schedule", "iterative", "--rounds", 2, "--refine")),
        ("again", ("--finetune", 1, "--refine-again", 1)),
    ):
        with ctrl_c(DigitsCNN, repairs, call=9):
            assert cli(*asked, name, *more).code == 130
        assert not (run / "pruned" / name).exists()
    with ctrl_c(DigitsCNN, repairs, call=9):
        prune_run(Run(run), Prune.of({"name": "one", "criterion": "magnitude", "sparsity": 0.8, "refine": True}, "test"))
    one_line(cli(*asked, "one", "--refine"), 1, "refining was interrupted", "--overwrite")


def merit(figures: dict[str, float]) -> tuple[float, ...]:
    return merit_of(Classification().choosing, figures)
