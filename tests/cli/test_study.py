"""compare over cases and seeds: whole, resumable, in parallel, honest about where its figures come from."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from prunekit.recipe import RESOLVED
from prunekit.recipe.study import Study
from prunekit.search.study import split
from prunekit.search.summary import area
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import RECIPE, Cli

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
STUDY = """
cases: {small: small.yaml}
seeds: [0, 1]
samples: 24
criteria: [magnitude, random, "tempered(taylor)"]
structures: {unstructured: [0.5, 0.8], channels: [0.4]}
allocations: {unstructured: [global], channels: [global, uniform]}
leading: 1
always: [magnitude]
compensate: true
tune: {epochs: 1, sparsities: {unstructured: [0.8]}}
"""


SHORT = STUDY.replace("seeds: [0, 1]", "seeds: [0]").replace('"tempered(taylor)"', "taylor").replace("leading: 1", "leading: 0")
SMALL = SHORT.replace("magnitude, random, taylor", "magnitude, taylor").replace("unstructured: [0.5, 0.8]", "unstructured: [0.8]")
LEAST = """
cases: {small: small.yaml}
seeds: [0, 1]
samples: 24
criteria: [magnitude, random]
structures: {unstructured: [0.8], "2:4": [0.5]}
allocations: {unstructured: [global]}
leading: 0
always: [magnitude]
tune: {epochs: 1, sparsities: {unstructured: [0.8]}}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("drawn", "short")
def test_a_study_from_one_command(study: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study.write_text(STUDY + "refine: {of: {unstructured: [magnitude]}}\n")  # at the sparsities of tune
    done = cli("compare", study, "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads((out / "compare.json").read_text())
    assert {(e["case"], e["structure"]) for e in found["summary"]} == {("small", "unstructured"), ("small", "channels")}
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["rows"]
    one_shot = [r for r in rows if r["epochs"] == "0" and not r["control"] and not r["repair"]]
    assert len(one_shot) == 2 * (1 * 2 + 2 * 1) * 7  # seeds x cells x (magnitude, random, taylor, four between)
    assert len([r for r in rows if r["control"] == "shuffled"]) == len(one_shot)
    assert {r["epochs"] for r in rows} == {"0", "1"}
    assert {(r["structure"], r["sparsity"]) for r in rows if r["repair"] == "compensated"} == {
        ("unstructured", "0.5"), ("unstructured", "0.8"), ("channels", "0.4")
    }  # fmt: skip
    assert all(e["repaired"] for e in found["summary"])
    for repair in ("refined", "refined+compensated"):
        mine = [r for r in rows if r["repair"] == repair]
        assert {(r["structure"], r["sparsity"]) for r in mine} == {("unstructured", "0.8")}
        same = ("seed", "structure", "criterion", "allocation", "sparsity")
        for r in mine:
            (plain,) = [o for o in one_shot if all(o[k] == r[k] for k in same)]
            assert r["achieved"] == plain["achieved"]
            assert float(r["validation_kl"]) < float(plain["validation_kl"])
        summary = next(e for e in found["summary"] if e["structure"] == "unstructured")["repaired"][repair]["magnitude"]
        magnitude = [100 * float(r["test_accuracy"]) for r in mine if r["method"] == "magnitude"]
        assert summary["values"] == pytest.approx(magnitude)
        assert summary["unrepaired"]["mean"] < summary["mean"]
    # a cell by hand
    run = Run(out / "runs" / "small-seed1")
    assert run.recipe.seed == 1
    assert run.recipe.data is not None
    assert run.recipe.data.args["seed"] == 1  # the split too
    weights = {name: run.model.get_parameter(name) for name in ("conv1.weight", "conv2.weight", "conv3.weight")}
    threshold = torch.cat([w.detach().abs().flatten() for w in weights.values()]).sort().values
    with torch.no_grad():
        limit = threshold[round(0.8 * len(threshold)) - 1]
        for weight in weights.values():
            weight[weight.abs() <= limit] = 0
        hits = torch.cat([(run.model(x).argmax(1) == y).float() for x, y in run.batches("test")])
    (cell,) = [
        r for r in one_shot
        if (r["seed"], r["structure"], r["criterion"], r["sparsity"]) == ("1", "unstructured", "magnitude", "0.8")
    ]  # fmt: skip
    assert float(cell["test_accuracy"]) == pytest.approx(float(hits.mean()))
    # the summary's areas are those of the rows
    entry = next(e for e in found["summary"] if e["structure"] == "unstructured")
    curves = [
        {float(r["sparsity"]): float(r["test_accuracy"]) for r in one_shot
         if (r["seed"], r["structure"], r["criterion"]) == (seed, "unstructured", "magnitude")}
        for seed in ("0", "1")
    ]  # fmt: skip
    assert entry["methods"]["magnitude"]["values"] == pytest.approx([area(curve) for curve in curves])
    page = (out / "report.html").read_text()
    assert "Regret" in page
    assert "tempered(taylor)" in page
    assert "With the plan refined" in page
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    # the benchmarks' tables are of any study
    for script, said in (("comparison", "regret"), ("compensation", "magnitude, compensated"), ("refine", "**refined**")):
        words = [sys.executable, str(BENCHMARKS / f"{script}_tables.py"), str(out)]
        printed = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert printed.returncode in (0, 1), printed.stderr  # 1: goals missed
        assert said in printed.stdout
        assert not printed.stderr


@pytest.mark.slow
def test_compensation_by_layers_alone(study: Path, cli: Cli, tmp_path: Path) -> None:
    """Other rows than with the network's outputs, in cells that are measured again when the other is asked for."""
    out, found = tmp_path / "out", {}
    for how in ("layers", "true"):
        study.write_text(SHORT.replace("compensate: true", f"compensate: {how}").replace("tune:", "# tune:"))
        done = cli("compare", study, "--out", out)
        assert done.code == 0, done.err
        with (out / "compare.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["repair"] == "compensated"]
        found[how] = [row["validation_kl"] for row in rows]
    assert len(found["layers"]) == len(found["true"]) == 3
    assert found["layers"] != found["true"]
    study.write_text(SHORT.replace("compensate: true", "compensate: layer"))
    done = cli("compare", study, "--out", out)
    assert done.code == 2
    assert "compensate" in done.err


@pytest.mark.exhaustive
def test_cells_are_the_same_from_processes_kept_and_measured_again_where_damaged(study: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study.write_text(LEAST)
    assert cli("compare", study, "--out", out).code == 0
    done = cli("compare", study, "--out", tmp_path / "two", "--jobs", 2)
    assert done.code == 0, done.err
    assert (out / "compare.csv").read_text() == (tmp_path / "two" / "compare.csv").read_text()
    first = (out / "compare.csv").read_text()
    cells = {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*.json")}
    damaged, changed = sorted(cells)[:2]
    damaged.write_text("{")
    changed.write_text(changed.read_text().replace('"made_from"', '"made_of"'))
    assert cli("compare", study, "--out", out).code == 0
    again = {p for p, time in cells.items() if p.stat().st_mtime_ns != time}
    assert again == {damaged, changed}
    assert (out / "compare.csv").read_text() == first


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_asking_for_refined_again_measures_nothing_else(study: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = (
        SMALL.replace("compensate: true\n", "")
        .replace("epochs: 1", "epochs: 3")
        .replace(", channels: [0.4]", "")
        .replace(", channels: [global, uniform]", "")
    )
    study.write_text(text + "refine: {tune: [refined]}\n")
    assert cli("compare", study, "--out", out).code == 0
    first = (out / "compare.csv").read_text()
    cells = {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*.json")}
    study.write_text(text + "refine: {tune: [refined], again: 1}\n")
    assert cli("compare", study, "--out", out).code == 0
    assert all(p.stat().st_mtime_ns == time for p, time in cells.items())
    second = (out / "compare.csv").read_text()
    more = set(second.splitlines()) - set(first.splitlines())
    assert set(first.splitlines()) <= set(second.splitlines())
    rows = [dict(zip(first.splitlines()[0].split(","), line, strict=True)) for line in csv.reader(more)]
    tuned = [r for r in csv.DictReader(second.splitlines()) if r["repair"] == "refined" and r["epochs"] == "3"]
    assert len(rows) == len(tuned) > 0
    assert {(r["repair"], r["epochs"]) for r in rows} == {("refined again", "3")}
    assert [r["achieved"] for r in rows] == [r["achieved"] for r in tuned]
    study.write_text(text + "refine: {tune: [refined]}\n")
    assert cli("compare", study, "--out", out).code == 0
    assert (out / "compare.csv").read_text() == first


@pytest.mark.parametrize(("epochs", "runs"), [(25, 2), (25, 1), (3, 3), (10, 4)])
def test_epochs_are_split_without_loss(epochs: int, runs: int) -> None:
    parts = split(epochs, runs)
    assert (len(parts), sum(parts)) == (runs, epochs)
    assert min(parts) >= 1
    assert max(parts) - min(parts) <= 1


def test_runs_that_are_there_already(run: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["compare"]["sparsities"] = [0.5]
    (run / "recipe.yaml").write_text(RESOLVED + yaml.safe_dump(recipe))
    done = cli("compare", run, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["study"]["seeds"] == [3]
    done = cli("compare", run, run, "--out", tmp_path / "twice")
    assert done.code == 2
    assert "a seed counts once" in done.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds: [0, 1]", "seeds: []"), "seeds"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "a seed counts once"),
        (("small: small.yaml", "small: other.yaml"), "no such recipe"),
        (("[magnitude, random", "[magnitud, random"), "magnitude"),
        (("structures:", "structure:"), "structure is not a study key"),
        (("unstructured: [global]", "unstructured: {lamp: [global]}"), "allocations names lamp"),
        (("unstructured: [global]", "unstructured: {magnitude: []}"), "allocations"),
        (("small: small.yaml", "'../up': small.yaml"), "use letters"),
        (("tune:", "refine: true\n#"), "refine needs refine.sparsities"),
        (("tune:", "refine: {sparsities: {unstructured: [0.42]}}\ntune:"), "refine.sparsities has 0.42"),
        (("tune:", "refine: {sparsities: {'4:8': [0.5]}}\ntune:"), "refine names 4:8"),
        (("tune:", "refine: {of: {unstructured: [lamp]}}\ntune:"), "refine.of names lamp"),
        (("tune:", "refine: {of: {unstructured: {magnitude: [refind]}}}\ntune:"), "'refind' does not exist for unstructured"),
        (("tune:", "refine: {of: {unstructured: {lamp: [refined]}}}\ntune:"), "refine.of names lamp"),
        (("tune:", "refine: {of: {unstructured: {magnitude: [refined, refined]}}}\ntune:"), "names a way twice"),
        (("tune:", "refine: {of: {unstructured: {magnitude: []}}}\ntune:"), "magnitude is []: give one at least"),
        (("tune:", "refine: {of: {unstructured: {}}}\ntune:"), "give one at least"),
        (("tune:", "refine: {of: {unstructured: {magnitude: 3}}}\ntune:"), "refine.of.unstructured.magnitude is 3: a list"),
        (
            ("tune:", "refine: {of: {unstructured: {magnitud: [refined]}}}\ntune:"),
            "of.unstructured.magnitud is 'magnitud': criterion",
        ),
        (("tune:", "refine: {of: {unstructured: {magnitude: [streamed]}}}\ntune:"), "way streamed learns from a stream"),
        (
            ("tune:", "refine: {of: {unstructured: {magnitude: [refined]}}, ways: {unstructured: [refined]}}\ntune:"),
            "refine.of says the ways of unstructured by method; leave it out of refine.ways",
        ),
        (("tune:", "refine: {tune: [rescored]}\ntune:"), "refine.tune names rescored"),
        (("tune:", "refine: {again: 1}\ntune:"), "name refined in refine.tune too"),
        (("tune:", "refine: {tune: [refined], again: 1}\ntune:"), "each run needs an epoch"),
        (("tune:", "refine: {ways: {channels: [edge-popup]}}\ntune:"), "'edge-popup' does not exist for channels"),
    ],
)
def test_a_study_that_makes_no_sense(study: Path, cli: Cli, tmp_path: Path, change: tuple[str, str], said: str) -> None:
    study.write_text(STUDY.replace(*change))
    done = cli("compare", study, "--out", tmp_path / "out")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out" / "compare.json").exists()


def test_allocations_by_criterion(study: Path) -> None:
    """One criterion's are its own; one that is not named, and a structure that is not, take the usual ones."""
    study.write_text(STUDY.replace("unstructured: [global]", "unstructured: {magnitude: [rows], random: [global, mean]}"))
    found = Study.model_validate(yaml.safe_load(study.read_text()))
    assert [found.allocations_of("unstructured", name) for name in ("magnitude", "random")] == [["rows"], ["global", "mean"]]
    assert (
        found.allocations_of("unstructured", "taylor")
        == found.allocations_of("2:4", "magnitude")
        == ["global", "uniform", "mean"]
    )
    assert found.allocations_of("channels", "taylor") == ["global", "uniform"]


def test_ways_by_method(study: Path) -> None:
    """One method's are its own, those of a structure all methods' once; a method that is not named has none there."""
    of = "{unstructured: {magnitude: [refined], random: [rescored, refined]}, channels: [random]}"
    study.write_text(STUDY + f"refine: {{of: {of}}}")
    found = Study.model_validate(yaml.safe_load(study.read_text()))
    assert [found.ways_of("unstructured", method) for method in ("magnitude", "random")] == [["refined"], ["rescored", "refined"]]
    assert found.ways_of("unstructured") == ["refined", "rescored"]
    assert found.ways_of("channels", "random") == found.ways_of("channels") == ["refined"]
    assert found.refine is not None
    assert list(found.refine.of["unstructured"]) == ["magnitude", "random"]


def test_a_way_at_some_sparsities_alone(study: Path) -> None:
    """It is measured there, the others of its method everywhere; and only where plans are repaired at all."""
    refine = "refine: {of: {unstructured: {magnitude: [refined, {rescored: [0.8]}]}}, sparsities: {unstructured: [0.5, 0.8]}}"
    found = Study.model_validate(yaml.safe_load(STUDY + refine))
    assert [found.ways_of("unstructured", "magnitude", s) for s in (0.5, 0.8)] == [["refined"], ["refined", "rescored"]]
    assert found.ways_of("unstructured", "magnitude") == found.ways_of("unstructured") == ["refined", "rescored"]
    with pytest.raises(ValidationError, match=r"rescored at 0\.7, where nothing of unstructured is repaired"):
        Study.model_validate(yaml.safe_load(STUDY + refine.replace("[0.8]", "[0.7]")))
    with pytest.raises(ValidationError, match="at least 1 item"):
        Study.model_validate(yaml.safe_load(STUDY + refine.replace("[0.8]", "[]")))


def test_what_is_refined_again_is_what_was_refined() -> None:
    """Of a method whose plans are refined at some sparsities, at these alone."""
    compared = STUDY.replace("epochs: 1, sparsities: {unstructured: [0.8]}", "epochs: 2, sparsities: {unstructured: [0.5, 0.8]}")
    refine = "refine: {tune: [refined], again: 1, of: {unstructured: {magnitude: [{refined: [0.5]}], random: [refined]}}}"
    found = Study.model_validate(yaml.safe_load(compared + refine))
    assert [found.refined_again_at("unstructured", name) for name in ("magnitude", "random")] == [[0.5], [0.5, 0.8]]


def test_out_is_needed_for_more_than_a_run(study: Path, run: Path, cli: Cli, tmp_path: Path) -> None:
    for arguments in ((study,), (run, run)):
        done = cli("compare", *arguments)
        assert done.code == 2
        assert "--out" in done.err
    assert cli("compare", study, "--out", tmp_path / "out", "--sparsity", 0.5).code == 2
    done = cli("compare", run, "--jobs", 2)
    assert done.code == 2
    assert "--out" in done.err


def test_a_runs_own_comparison_is_not_replaced(study: Path, run: Path, cli: Cli) -> None:
    before = (run / "compare.json").read_text()
    done = cli("compare", study, "--out", run)
    assert done.code == 2
    assert "a run folder" in done.err
    assert (run / "compare.json").read_text() == before


@pytest.mark.exhaustive
def test_ctrl_c_stops_the_workers_and_says_one_line(study: Path, tmp_path: Path) -> None:
    study.write_text(LEAST.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3]"))
    command = [sys.executable, "-m", "prunekit", "compare", str(study), "--out", str(tmp_path / "out"), "--jobs", "2", "-q"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a job in the background of a shell ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("runs/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "prunekit: interrupted"
