"""Options and compositions in criterion names, from the command line and in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from prunekit import Plan, Scores
from tests.cli.conftest import Cli


def test_options_and_compositions_have_files_and_cells_of_their_own(run: Path, cli: Cli) -> None:
    named = "influence(target=margin, aggregation=l2)"
    done = cli("score", run, "-c", named, "-c", "influence^0.25*magnitude^0.75", "-c", "rank(lamp)+rank(influence)", "--json")
    assert done.code == 0, done.err
    found = {r["criterion"]: r for r in json.loads(done.out)}
    assert list(found) == [
        "influence(target=margin,aggregation=l2)", "influence", "magnitude", "influence^0.25*magnitude^0.75", "lamp",
        "rank(influence)+rank(lamp)",
    ]  # fmt: skip
    assert found["influence"]["reused"]
    assert found["magnitude"]["reused"]
    assert not found["lamp"]["reused"]
    assert all(r["gradient_evaluations"] >= 0 and r["seconds"] >= 0 for r in found.values() if not r["reused"])
    files = {p.name for p in (run / "scores").iterdir()}
    assert {
        "influence.target-margin.aggregation-l2.safetensors", "influence--0.25---magnitude--0.75.safetensors",
        "rank-influence----rank-lamp.safetensors",
    } <= files  # fmt: skip
    product = Scores.load(run / "scores" / "influence--0.25---magnitude--0.75.safetensors")
    influence, magnitude = (Scores.load(run / "scores" / f"{n}.safetensors") for n in ("influence", "magnitude"))
    for name, tensor in product.importance.items():
        torch.testing.assert_close(tensor, influence.importance[name] ** 0.25 * magnitude.importance[name] ** 0.75)
    assert cli("compare", run, "--sparsity", 0.5, "--overwrite").code == 0
    cells = {c["criterion"] for c in json.loads((run / "compare.json").read_text())["cells"]}
    assert set(found) <= cells
    done = cli("prune", run, "-c", named, "-s", 0.5, "--name", "by-option", "--json")
    assert json.loads(done.out)["criterion"] == "influence(target=margin,aggregation=l2)"
    again = cli("score", run, "-c", "magnitude^.75 * influence^.250", "--json")
    assert all(r["reused"] for r in json.loads(again.out))
    assert cli("report", run).code == 0


@pytest.mark.parametrize("structure", ["unstructured", "channels"])
def test_prune_composes_from_the_parts_files(run: Path, cli: Cli, structure: str) -> None:
    done = cli("prune", run, "-c", "taylor*magnitude", "-s", 0.5, "--structure", structure, "--name", "a")
    assert done.code == 0, done.err
    plan = Plan.load(run / "pruned" / "a" / "plan.safetensors")
    assert plan.provenance["criterion"] == "magnitude*taylor"
    assert cli("score", run, "-c", "taylor*magnitude").code == 0
    assert plan.provenance["scores"] == Scores.load(run / "scores" / "magnitude---taylor.safetensors").digest


def test_prune_names_the_parts_that_lack(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "influence(target=margin)*magnitude*lamp", "-s", 0.5, "--name", "a")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "--criterion 'influence(target=margin)' --criterion lamp" in done.err


def test_tempered_tries_every_power_on_validation_data(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "tempered(taylor)", "-s", 0.6, "--name", "a", "--json")
    assert done.code == 0, done.err
    chosen = json.loads(done.out)["criterion"]
    accuracies = {}
    for name in ("magnitude", "magnitude^0.9*taylor^0.1", "magnitude^0.5*taylor^0.5", "taylor", chosen):
        for allocation in ("global", "uniform"):
            one = cli("prune", run, "-c", name, "-s", 0.6, "--allocation", allocation, "--name", "b", "--overwrite", "--json")
            accuracies[name] = max(accuracies.get(name, 0.0), json.loads(one.out)["validation_accuracy"])
    assert accuracies[chosen] == max(accuracies.values())
    assert json.loads(cli("prune", run, "-c", "tempered(taylor)", "-s", 0.6, "--name", "a", "--json").out)["reused"]
    scored = cli("score", run, "-c", "tempered(taylor)", "--json")
    assert len(json.loads(scored.out)) == 6


def test_a_composed_file_of_older_parts_is_refused(run: Path, cli: Cli) -> None:
    assert cli("score", run, "-c", "random*magnitude").code == 0
    assert cli("score", run, "-c", "random", "--seed", 9, "--overwrite").code == 0
    done = cli("prune", run, "-c", "random*magnitude", "-s", 0.5, "--name", "a")
    assert done.code == 1
    assert "magnitude---random.safetensors: made from scores" in done.err
    assert "score again with --overwrite" in done.err
    stale = cli("score", run, "-c", "random*magnitude", "--seed", 9)
    assert stale.code == 1
    assert "made from other inputs" in stale.err
    assert cli("score", run, "-c", "random*magnitude", "--seed", 9, "--overwrite").code == 0
    assert cli("prune", run, "-c", "random*magnitude", "-s", 0.5, "--name", "a").code == 0


def test_recipes_check_and_canonise_names(run: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["score"]["criteria"] = ["magnitude", "taylor( aggregation = l2 )", "tempered(taylor)"]
    recipe["compare"]["sparsities"] = [0.5]
    recipe["prune"] = [{"name": "p", "criterion": "taylor^.5*magnitude^.5", "sparsity": 0.5}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("run", tmp_path / "r.yaml", "--out", tmp_path / "other", "--json")
    assert done.code == 0, done.err
    resolved = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())
    assert resolved["score"]["criteria"] == ["magnitude", "taylor(aggregation=l2)", "tempered(taylor)"]
    compared = json.loads((tmp_path / "other" / "compare.json").read_text())
    assert list(dict.fromkeys(c["criterion"] for c in compared["cells"]))[:2] == ["magnitude", "taylor(aggregation=l2)"]
    wrong = {"score": {"criteria": ["taylor(aggregation=l3)"]}, "prune": [{"name": "p", "criterion": "x*y", "sparsity": 0}]}
    for key, value in wrong.items():
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**recipe, key: value}))
        done = cli("run", tmp_path / "bad.yaml", "--out", tmp_path / "bad")
        assert done.code == 2
        assert done.err.count("\n") == 1
        assert f"{key}." in done.err


def test_a_name_that_is_none_is_wrong_use(run: Path, cli: Cli) -> None:
    for verb in (("score", run), ("prune", run, "-s", 0.5)):
        done = cli(*verb, "-c", "influence(target=margn)")
        assert done.code == 2
        assert "did you mean margin" in done.err
    done = cli("score", run, "-c", "magnitude", "-c", "lamp", "-c", "influenc")
    assert done.code == 2
    assert not (run / "scores" / "lamp.safetensors").exists()


def test_files_that_are_not_what_their_name_says(run: Path, cli: Cli) -> None:
    scores = run / "scores"
    assert cli("score", run, "-c", "snip^0.5*lamp").code == 0
    assert "lamp*snip^0.5" in json.loads(cli("info", run, "--json").out)["scores"]
    (scores / "lamp.safetensors").rename(scores / "foo.v2.safetensors")
    done = cli("compare", run, "--overwrite")
    assert done.code == 1
    assert "foo.v2.safetensors: holds scores of lamp, which belong in lamp.safetensors" in done.err
    report = cli("report", run)
    assert report.code == 0, report.err
    assert cli("info", run).code == 0
    (scores / "foo.v2.safetensors").write_bytes(b"no tensors")
    done = cli("compare", run, "--overwrite")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "foo.v2.safetensors" in done.err
    assert cli("report", run).code == 0
