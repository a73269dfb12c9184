"""report draws what a run folder holds: no model, no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Cli, with_recipe

SECTIONS = (
    "Pruned models", "what came back, and the samples that asked for it", "The kernel's account",
    "Training, seen along its own time", "Sample by sample", "Criteria compared", "Where it comes from",
)  # fmt: skip


@pytest.mark.usefixtures("short")
def test_a_run_whose_modules_are_gone_is_reported_whole(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "magnitude", "-s", 0.9, "--refine", "--name", "better")
    assert done.code == 0, done.err
    assert cli("eval", run / "pruned" / "better").code == 0
    assert json.loads(cli("report", run, "--json").out)["missing"] == []
    page, recipe = (run / "report.html").read_text(), (run / "recipe.yaml").read_text()
    assert [section for section in SECTIONS if section.lower() not in page.lower()] == []
    parts = {part: {**yaml.safe_load(recipe)[part], "factory": "a_module_that_is_gone:build"} for part in ("model", "data")}
    with_recipe(run, **parts)
    assert cli("score", run, "-c", "magnitude").code == 2
    done = cli("report", run, "--json")
    assert (done.code, done.err) == (0, "")
    assert {**json.loads(done.out), "path": ""} == {"path": "", "left_out": [], "missing": []}
    drawn = (run / "report.html").read_text()
    assert drawn.split("The resolved recipe")[0] == page.split("The resolved recipe")[0]


def test_what_is_missing_is_told_with_the_command_that_adds_it(run: Path, cli: Cli) -> None:
    (run / "timeline.json").unlink()
    (run / "pruned" / "small" / "eval.json").unlink()
    done = cli("report", run)
    assert done.code == 0
    assert f"report: no evaluation of small; prunekit eval {run / 'pruned' / 'small'} adds it\n" in done.out
    assert f"report: no timeline of training; prunekit eval {run / 'pruned' / 'loose'} adds it\n" in done.out
    assert "Not here yet: no timeline of training" in (run / "report.html").read_text()
    assert cli("eval", run / "pruned" / "small").code == 0
    assert json.loads(cli("report", run, "--json").out)["missing"] == []
