"""explain as text, JSON and page; prune --classes; the report's view of training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from prunekit.apply import masked
from prunekit.criteria import Scores, score
from prunekit.measure import kl
from prunekit.plan import Plan
from prunekit.verbs.explaining import pictures_of
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import Cli
from tests.pictures import undrawn

EXPLAINED = {
    "channel conv2 1": ("channel-conv2-1", "channel 1 of conv2"),
    "layer conv3": ("layer-conv3", "layer conv3"),
    "weight conv2.weight 1,3,1,1": ("weight-conv2.weight-1_3_1_1", "weight conv2.weight[1,3,1,1]"),
    "sample 12": ("sample-test-12", "test sample 12"),
    "diff small": ("diff-small", "dense against small"),
    "diff loose small": ("diff-loose-small", "loose against small"),
    "pruned loose": ("pruned-loose", "what loose removes"),
}


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("asked", EXPLAINED)
def test_text_json_and_page(cli: Cli, run: Path, asked: str) -> None:
    slug, title = EXPLAINED[asked]
    few = ("--samples", 8, "--nodes", 2)
    shown = cli("explain", run, *asked.split(), *few)
    assert shown.code == 0, shown.err
    assert title in shown.out
    page = run / "explain" / f"{slug}.html"
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "http" not in text
    assert title in text
    page.unlink()
    with undrawn():
        told = cli("explain", run, *asked.split(), *few, "--json")
    result = json.loads(told.out)
    assert result["title"] == title
    assert result["kind"] == "explanation"
    assert result["schema"] == 1
    assert result["made_from"]["trajectory"] == Run(run).trajectory.hash
    assert Path(result["path"]) == page
    captions = [shown["caption"] for place in pictures_of(Run(run), result).values() for shown in place]
    assert re.findall("<figcaption>([^<]*)</figcaption>", page.read_text()) == captions
    assert captions or asked not in ("sample 12", "diff small", "pruned loose")
    if not asked.startswith(("diff", "pruned")):
        assert "second moments were not recorded; train.record.second_moments: true in the" in result["training"]["note"]
        assert result["certificate"]["mean_error"] > 0
        assert "training samples: left out" in shown.out
        assert [p["name"] for p in result["pruning"]] == ["loose", "small"]


def test_options_of_explain(cli: Cli, run: Path) -> None:
    found = json.loads(
        cli(
            "explain", run, "layer", "conv1", "--split", "validation", "--samples", 5, "--nodes", 2, "--pruned", "small", "--json"
        ).out
    )
    assert (found["split"], found["samples"], found["certificate"]["nodes"]) == ("validation", 5, 2)
    assert [p["name"] for p in found["pruning"]] == ["small"]
    removed = ~Plan.load(run / "pruned" / "small" / "plan.safetensors").keep["conv1"]
    unit = int(removed.nonzero()[0])
    one = json.loads(cli("explain", run, "channel", "conv1", unit, "--samples", 5, "--pruned", "small", "--json").out)["pruning"][
        0
    ]
    assert (one["stays"], one["removed"]) == (False, one["of"])


def test_with_second_moments_training_samples_are_shown(cli: Cli, run: Path, tmp_path: Path) -> None:
    recipe = (run / "recipe.yaml").read_text().replace("second_moments: false", "second_moments: true").split("\n", 1)[1]
    (tmp_path / "moments.yaml").write_text(recipe)
    other = tmp_path / "moments"
    assert cli("train", tmp_path / "moments.yaml", "--out", other).code == 0
    found = json.loads(cli("explain", other, "channel", "conv2", 1, "--samples", 6, "--json").out)
    assert found["training"]["sum"] == pytest.approx(found["contribution"]["kernel"], abs=1e-4)
    assert len(found["training"]["raised"]) == 12
    assert "Raised it most" in Path(found["path"]).read_text()
    sample = json.loads(cli("explain", other, "sample", 7, "--split", "train", "--samples", 6, "--json").out)
    assert sample["label"] == int(Run(other).splits["train"].batch([7])[1])
    seen = [s for s in range(len(Run(other).trajectory)) if 7 in Run(other).trajectory.step(s).batches[0]]
    assert sample["steps"]["seen"] == seen
    assert sum(sample["steps"]["kernel"]) == pytest.approx(sample["contribution"]["both"], abs=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("chanel conv2 1", "did you mean channel?"),
        ("channel conv4 1", "did you mean conv3"),
        ("channel classifier 1", "no channels that stand alone"),
        ("channel conv2 99", "it has 8, numbered 0 to 7"),
        ("layer conv", "did you mean conv3"),
        ("weight conv2.weights 1", "did you mean conv2.weight"),
        ("sample 1203", "there are 360, numbered 0 to 359"),
        ("sample 400", "--split train has one of that number"),
        ("sample 1 --split tset", "did you mean test?"),
        ("layer conv1 --split train", "--split is 'train'"),
        ("diff smal", "did you mean small?"),
        ("diff small lose", "did you mean loose?"),
        ("diff small small", "does not differ from itself"),
        ("pruned smal", "did you mean small?"),
        ("pruned small 3", "leave '3' out"),
        ("channel", "of what? Give GROUP"),
        ("pruned", "of what? Give NAME"),
        ("layer conv1 --pruned lose", "did you mean loose?"),
    ],
)
def test_bad_names_are_one_line_with_near_names(cli: Cli, finished: Path, asked: str, message: str) -> None:
    done = cli("explain", finished, *asked.split())
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (finished / "explain").exists()


def test_a_pruned_models_folder_is_enough(cli: Cli, run: Path, tmp_path: Path) -> None:
    short = cli("explain", run / "pruned" / "small", "--json")
    assert short.code == 0, short.err
    found, long = json.loads(short.out), json.loads(cli("explain", run, "pruned", "small", "--json").out)
    assert found | {"cost": 0} == long | {"cost": 0}
    assert (found["split"], found["samples"]) == ("scoring", 24)
    model, plan = Run(run).model, Plan.load(run / "pruned" / "small" / "plan.safetensors")
    x, _ = Run(run).splits["scoring"].batch(range(24))
    with torch.no_grad():
        assert found["after"]["divergence"] == pytest.approx(kl(masked(model, plan)(x), model(x)), rel=1e-4)
    assert abs(found["after"]["residual"]) < 0.05 * found["after"]["divergence"]
    gone = {f"{name} {unit}" for name, keep in plan.keep.items() for unit in (~keep).nonzero().flatten().tolist()}
    assert {unit["name"] for unit in found["units"]} <= gone
    for asked in (("explain", run), ("explain", tmp_path), ("explain", run / "pruned" / "none")):
        done = cli(*asked)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err


def test_a_model_for_some_classes_is_blamed_on_their_samples(cli: Cli, run: Path) -> None:
    few = ("--refine", "--refine-budget", "1s")
    assert cli("prune", run, "-c", "magnitude", "-s", 0.8, "--classes", "3,5", *few, "--name", "two").code == 0
    found = json.loads(cli("explain", run / "pruned" / "two", "--json").out)
    scoring = Run(run).splits["scoring"]
    samples = [row for unit in found["units"] for row in unit["samples"]]
    assert [row["class"] for row in found["after"]["classes"]] == [3, 5]
    assert samples
    assert all(int(scoring.batch([row["index"]])[1]) == row["label"] in (3, 5) for row in samples)


def test_what_cannot_be_explained(cli: Cli, run: Path) -> None:
    heads = cli("explain", run, "head", "attention", 3)
    assert (heads.code, heads.err.count("\n")) == (1, 1)
    assert "no attention was found" in heads.err
    train = cli("explain", run, "sample", 3, "--split", "train")
    assert (train.code, train.err.count("\n")) == (1, 1)
    assert "train.record.second_moments: true in the recipe" in train.err
    assert "Recorder(" not in train.err
    shutil.copy(run / "pruned" / "loose" / "plan.safetensors", run / "pruned" / "small" / "plan.safetensors")
    other = cli("explain", run, "diff", "small")
    assert (other.code, other.err.count("\n")) == (1, 1)
    assert "apply it first" in other.err


def test_a_fine_tuned_model_is_told_apart_from_its_pruning(cli: Cli, run: Path) -> None:
    assert cli("prune", run, "-c", "magnitude", "-s", 0.6, "--finetune", 1, "--name", "tuned").code == 0
    found = json.loads(cli("explain", run, "diff", "tuned", "--json").out)
    assert found["changes"]
    assert any(abs(row["training_since"]) > 1e-3 for row in found["changes"])
    for row in found["changes"]:
        total = row["rewinding"] + row["pruning"] + row["training_since"]
        assert total == pytest.approx(row["margin_dense"] - row["margin_pruned"], abs=1e-4)


# -- prune --classes ---------------------------------------------------------------------------------------------------


def test_scores_for_classes_are_those_of_their_samples(cli: Cli, run: Path) -> None:
    done = cli("prune", run, "-c", "influence", "-s", 0.5, "--structure", "channels", "--classes", "5,3", "--name", "two")
    assert done.code == 0, done.err
    assert "for classes 3, 5" in done.out
    assert cli("prune", run, "-c", "taylor", "-s", 0.5, "--structure", "channels", "--classes", "3,5", "--name", "t").code == 0
    opened = Run(run)
    x, y = opened.splits["scoring"].pair
    mine = torch.isin(y, torch.tensor([3, 5]))
    assert mine.sum() > 24  # more than the recipe's scoring samples: the first 24 of these classes
    pair = (x[mine][:24], y[mine][:24])

    def two_outputs(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return out[:, [3, 5]]

    for name, target in (("influence", two_outputs), ("taylor", "outputs")):
        found = Scores.load(run / "scores" / "classes-3-5" / f"{name}.safetensors")
        expected = score(opened.trajectory, opened.model, [pair], name, target=target, ignore=["classifier.weight"])
        for parameter, importance in expected.importance.items():
            torch.testing.assert_close(found.importance[parameter], importance)
        assert found.provenance["classes"] == [3, 5]
    plan = Plan.load(run / "pruned" / "two" / "plan.safetensors")
    assert plan.provenance["request"]["classes"] == [3, 5]
    assert cli("eval", run / "pruned" / "two").code == 0
    told = json.loads((run / "pruned" / "two" / "eval.json").read_text())["asked_classes"]
    test = opened.splits["test"].pair[1]
    assert told["samples"] == int(torch.isin(test, torch.tensor([3, 5])).sum())
    assert cli("report", run).code == 0  # the run's own files stay as they are


def test_auto_judges_classes_on_their_samples(cli: Cli, run: Path) -> None:
    pruned = cli("prune", run, "-s", 0.8, "--structure", "channels", "--classes", "3,5", "--name", "best", "--no-refine",
                 "--json")  # fmt: skip
    assert pruned.code == 0, pruned.err
    done = json.loads(pruned.out)
    opened = Run(run)
    x, y = opened.splits["validation"].pair
    mine = torch.isin(y, torch.tensor([3, 5]))

    def accuracy(folder: Path) -> float:
        from prunekit import load

        return float((load(folder, opened.new_model)(x[mine]).argmax(1) == y[mine]).double().mean())

    reached = {}
    for name in ("influence", "magnitude", "gradient", "taylor", "random"):
        for allocation in ("global", "uniform"):
            folder = run / "pruned" / f"{name}-{allocation}"
            cli("prune", run, "-c", name, "-s", 0.8, "--structure", "channels", "--classes", "3,5", "--allocation", allocation,
                "--name", folder.name, "-q")  # fmt: skip
            reached[name, allocation] = accuracy(folder)
    assert reached[done["criterion"], done["allocation"]] == max(reached.values())
    assert done["validation_accuracy"] == pytest.approx(max(reached.values()))
    again = cli("prune", run, "-s", 0.8, "--structure", "channels", "--classes", "3,5", "--name", "best", "--no-refine")
    assert "reused" in again.out
    other = cli("prune", run, "-s", 0.8, "--structure", "channels", "--classes", "3", "--name", "best", "--no-refine")
    assert other.code == 1
    assert "classes" in other.err


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("3,a", "write whole numbers"),
        ("3,3", "given twice"),
        ("12", "class 12 does not exist; the model has 10 outputs"),
        ("-1", "--classes"),
    ],
)
def test_bad_classes(cli: Cli, finished: Path, classes: str, message: str) -> None:
    done = cli("prune", finished, "-c", "magnitude", "-s", 0.5, f"--classes={classes}", "--name", "none")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (finished / "pruned" / "none").exists()


# -- report ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_the_report_shows_training_along_its_time_as_eval_made_it(cli: Cli, run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "Training, seen along its own time" in text
    assert "Sample by stretch of training" in text
    kept = (run / "timeline.json").read_text()
    (run / "timeline.json").write_text("{")
    damaged = json.loads(cli("report", run, "--json").out)
    assert (len(damaged["left_out"]), len(damaged["missing"])) == (1, 1)
    assert f"prunekit eval {run / 'pruned' / 'loose'}" in damaged["missing"][0]
    assert "Training, seen along its own time" not in (run / "report.html").read_text()
    assert (run / "timeline.json").read_text() == "{"
    assert cli("eval", run / "pruned" / "loose").code == 0
    assert json.loads((run / "timeline.json").read_text()) == json.loads(kept)
    assert json.loads(cli("report", run, "--json").out)["missing"] == []
    assert (run / "report.html").read_text() == text


def test_squeezed_models_are_explained(run: Path, cli: Cli) -> None:
    assert cli("prune", run, "-c", "magnitude", "-s", 0.97, "--squeeze", "--name", "tight").code == 0
    plan = run / "pruned" / "loose" / "plan.safetensors"
    assert cli("prune", run, "--apply", plan, "--squeeze", "--name", "applied").code == 0
    for arguments in (("layer", "conv1"), ("diff", "tight"), ("diff", "applied")):
        done = cli("explain", run, *arguments)
        assert done.code == 0, done.err


def test_the_job_of_the_docs_which_images_and_channels_made_this_digit_wrong(cli: Cli, run: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    commands = re.findall(
        r"^\$ prunekit (explain .*)$", text.partition("## Why is this answer wrong?")[2].partition("## ")[0], re.M
    )
    assert len(commands) == 3
    listed = json.loads(cli("explain", run, "errors", "--json").out)
    wrong = str(listed["rows"][0]["index"])
    for command in commands:
        done = cli(*(str(run) if word == "RUN" else word.replace("291", wrong) for word in command.split()), "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert Path(found["path"]).is_file()
        if found["what"] != "errors":
            assert found["asked"] == "error"
            assert pictures_of(Run(run), found)
            sums = found["completeness"]
            assert sums["start"] + sums["layers"] + sums["residual"] == pytest.approx(sums["model"], abs=1e-9)
    of_errors = cli("explain", run, "layer", "--samples", "errors")
    assert of_errors.code == 0, of_errors.err
    assert f"of {listed['errors']} errors" in of_errors.out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("errors 3", "leave '3' out"),
        ("errors --nodes 2", "has no --nodes; that is an option of explain RUN sample, explain RUN layer"),
        ("diff small --pruned small", "has no --pruned; that is an option of explain RUN sample"),
        ("layer --nodse 2", "explain RUN layer: there is no option --nodse"),
        ("sample 3 --split train --target 3", "not of a training sample"),
        ("sample 3 --samples errors", "samples are chosen for"),
        ("diff small --target 3", "has no --target"),
        ("pruned small --limit 3", "explain RUN errors, explain RUN sample"),
        ("pruned small --samples errors", "samples are chosen for"),
        ("layer --samples 3,3", "has a number twice"),
        ("layer --samples 3,999", "test sample 999 does not exist"),
        ("layer --samples some", "--samples is 'some'"),
        ("weight conv2.wieght", "did you mean conv2.weight"),
        ("layer --target 12", "of 0 to 9"),
        ("channel conv2 --pruned small", "a ranking is of the trained model"),
    ],
)
def test_what_says_nothing_of_a_form_is_refused(cli: Cli, finished: Path, asked: str, message: str) -> None:
    done = cli("explain", finished, *asked.split())
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err
