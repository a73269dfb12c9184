"""The command line called in this process, and one small finished run to work on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from torch import nn

import prunekit
from prunekit import Plan, checkpoint
from prunekit.cli import main
from prunekit.data import Samples
from prunekit.measure import timed
from prunekit.measure.latency import FEWEST
from prunekit.recipe import RESOLVED, Recipe, read_yaml
from prunekit.search import ways
from prunekit.verbs import compensating, evaluating
from prunekit.verbs import refining as verbs_refining
from tests.cli import small_study
from tests.pictures import undrawn

RECIPE = """
seed: 3
threads: 1
model: {factory: "prunekit.models:digits_cnn", args: {channels: [6, 8, 8]}}
data: {factory: "prunekit.data:digits", args: {}}
train: {optimizer: {name: adamw, lr: 0.02, weight_decay: 0.05}, epochs: 3, batch_size: 128}
prunable: {ignore: [classifier.weight]}
score: {samples: 24}
compare: {allocations: [global, uniform], sparsities: [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]}
prune:
  - {name: loose, sparsity: 0.5, structure: unstructured, refine: false}
  - {name: small, sparsity: 0.5, structure: channels, refine: false}
eval: {samples: 32, nodes: 2}
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refining takes 20 steps, 4 rounds and 128 samples at most: for tests of what is done with refined plans.

    Unlike a budget in seconds this means the same on a machine that is busy.
    """

    def shortened(plan: Plan, model: nn.Module, samples: Samples, *, steps: int = 20, rounds: int = 4, **options: Any) -> Plan:
        return prunekit.refine(plan, model, samples.first(128), steps=min(steps, 20), rounds=min(rounds, 4), **options)

    for module in (verbs_refining, ways):
        monkeypatch.setattr(module, "refine", shortened)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``cli("score", RUN, ...)`` -> exit code and what was printed."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["prunekit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        code = stop.value.code
        return Done(code if isinstance(code, int) else 0, printed.out, printed.err)

    return call


@pytest.fixture(autouse=True)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compensation is computed from 128 samples, not a thousand, and ``eval`` times few passes: what is done with both is the
    same."""
    monkeypatch.setattr(compensating, "SAMPLES", 128)
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(evaluating, "timed", partial(timed, most=FEWEST))


@pytest.fixture
def measured() -> None:
    """For tests of the figures that ``eval`` times."""


@pytest.fixture
def drawn() -> None:
    """For tests whose pictures are to be drawn; others write blank ones. The finished run's are drawn too."""


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "drawn" in request.fixturenames else undrawn():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run made by ``prunekit run``; shared, so tests that write take ``run`` instead."""
    return whole_run(RECIPE, "finished run", tmp_path_factory)  # a path with a space


def whole_run(recipe: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that ``prunekit run`` makes of a recipe's text.

    Of several pytest-xdist workers the first makes it and the others copy it.
    """
    folder = tmp_path_factory.mktemp(name)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _made(recipe, folder)
    shared = tmp_path_factory.getbasetemp().parent / name
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            _made(recipe, folder).parent.rename(shared)
    shutil.copytree(shared, folder, dirs_exist_ok=True)
    return folder / "run"


def _made(recipe: str, folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(recipe)
    argv, sys.argv = sys.argv, ["prunekit", "run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--quiet"]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    assert stop.value.code == 0
    return folder / "run"


def with_recipe(run: Path, **changes: Any) -> None:
    """Gives a run another recipe, as if it had been trained with it."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | changes
    (run / "recipe.yaml").write_text(RESOLVED + yaml.safe_dump(recipe))
    path = run / "trajectory" / "trajectory.json"
    header = checkpoint.read_json(path)
    facts = json.loads(json.dumps(Recipe.resolved(read_yaml(run / "recipe.yaml"), run / "recipe.yaml").training_facts()))
    checkpoint.write_json(path, {**header, "provenance": {**header["provenance"], "recipe": facts}})


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a small study, in the working folder."""
    yield from small_study.written(tmp_path, monkeypatch)
