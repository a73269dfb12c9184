"""The jobs of docs/jobs.md: a shell reads the scripts, and what they call is run on a small net, by a clock of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.measure import latency
from tests.cli.conftest import RECIPE, Cli, Done
from tests.cli.test_speed import Machine

DOCS = Path(__file__).parents[2] / "docs"
NOTES = "import json, os, sys; open(os.environ['CALLED'], 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
RECORDS = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(NOTES)} "$@"\n'
"""A ``prunekit`` that only notes what it is called with."""


def called(script: str, folder: Path, *arguments: object, **settings: object) -> list[list[str]]:
    """The arguments of every call of ``prunekit`` that a script makes."""
    program, calls = folder / "bin" / "prunekit", folder / f"{script}.calls"
    program.parent.mkdir(exist_ok=True)
    program.write_text(RECORDS)
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CALLED": str(calls), **{name: str(value) for name, value in settings.items()}}
    calls.unlink(missing_ok=True)
    words = ["sh", str(DOCS / "jobs" / script), *map(str, arguments)]
    subprocess.run(words, check=True, env=environment)
    return [json.loads(line) for line in calls.read_text().splitlines()]


def small_recipe(folder: Path) -> Path:
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.replace("batch_size: 128}", "batch_size: 128, record: {second_moments: true}}"))
    return recipe


def test_the_page_names_every_script() -> None:
    page = (DOCS / "jobs.md").read_text()
    for script in (DOCS / "jobs").glob("*.sh"):
        assert f"docs/jobs/{script.name}" in page


@pytest.mark.slow
def test_a_faster_model_in_three_commands(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "one_pass", Machine())
    settings = {"RECIPE": small_recipe(tmp_path), "RUN": tmp_path / "fast run"}
    assert called("faster-model.sh", tmp_path)[-1][5:7] == ["channels", "--speedup"]
    assert "3" in called("faster-model.sh", tmp_path)[-1]
    commands = called("faster-model.sh", tmp_path, SPEEDUP=1.5, **settings)
    assert len(commands) == 3
    done = Done(1, "", "")
    for command in commands:
        done = cli(*command)
        assert done.code == 0, done.err
    verdict = done.out.strip().splitlines()[-1]
    assert "parameters stay; validation accuracy " in verdict
    assert "× at batch 64 (" in verdict
    assert verdict.endswith("; asked 1.5)")
    reached = float(verdict.partition("× at batch")[0].rpartition(" ")[2])
    assert reached >= 1.5
    refused = cli(*called("faster-model.sh", tmp_path, SPEEDUP=1e5, **settings)[-1], "--overwrite")
    assert refused.code == 1
    assert "speedup is 100000; the fastest plan that could be made of channels reaches " in refused.err


@pytest.mark.slow
def test_why_an_answer_is_wrong_in_one_command(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("train", small_recipe(tmp_path), "--out", run).code == 0
    (listing,) = called("why-wrong.sh", tmp_path, RUN=run)
    listed = cli(*listing)
    assert listed.code == 0, listed.err
    worst = json.loads(cli(*listing, "--json").out)["rows"][0]
    assert f"prunekit explain {run} sample {worst['index']}\n" in listed.out
    (asking,) = called("why-wrong.sh", tmp_path, worst["index"], RUN=run)
    answer = cli(*asking)
    assert answer.code == 0, answer.err
    assert f"label {worst['label']}, answered {worst['answer']}" in answer.out
    for told in ("training samples that raised it: ", "training samples that lowered it: ", "\nchannel ", "\nlayer "):
        assert told in answer.out, told
    assert cli(*called("why-wrong.sh", tmp_path, 10**6, RUN=run)[0]).code == 2
