"""Several processes at one work: the same as one, and one line and nothing half-written where one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit import Plan, Scores, checkpoint, ranks
from tests.conftest import record
from tests.faults.small import RECIPE, content, prunekit
from tests.on_ranks import everything, samples, small, verbs
from tests.ranks_of import CLI, Done, Ranks

MANY = (2, pytest.param(3, marks=pytest.mark.exhaustive))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded path, and a trained run that copies are worked on of."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    model = small().double()
    x, y = (torch.cat(parts) for parts in zip(*samples(24, (24,)), strict=True))
    record(folder / "trajectory", model, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1), 6, (x, y))
    (folder / "recipe.yaml").write_text(RECIPE.replace("samples: 8", "samples: 7"))
    assert prunekit("train", folder / "recipe.yaml", "--out", folder / "run", "--quiet") == 0
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shutil.copytree(folder / "run", folder / "run-1")
    verbs(folder / "run-1")
    return everything(folder, folder / "trajectory")


@pytest.fixture(scope="module", params=MANY)
def together(request: pytest.FixtureRequest, folder: Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What each of several ranks found."""
    many, run = request.param, folder / f"run-{request.param}"
    shutil.copytree(folder / "run", run)
    for done in Ranks(many, "tests.on_ranks", folder, folder / "trajectory", run).done():
        assert done.code == 0, done.err
    names = [folder / f"{rank}-of-{many}" for rank in range(many)]
    return [(json.loads(Path(f"{name}.json").read_text()), torch.load(f"{name}.pt", weights_only=True)) for name in names]


@pytest.mark.slow
def test_all_ranks_have_the_same_bits(together: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
    for values, tensors in together[1:]:
        assert values == together[0][0]
        assert tensors.keys() == together[0][1].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, together[0][1][name]), name


@pytest.mark.slow
def test_what_they_find_is_what_one_process_finds(
    together: list[tuple[dict[str, Any], dict[str, Tensor]]], alone: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    values, tensors = together[0]
    assert tensors.keys() == alone[1].keys()
    for name, tensor in tensors.items():
        near = 1e-3 if name.startswith("layers by admm: new") else 1e-6  # its conjugate gradients carry rounding on
        torch.testing.assert_close(tensor, alone[1][name], rtol=near, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert values.keys() == alone[0].keys()
    for name, expected in alone[0].items():
        if name == "first":
            assert values[name] == expected == [0, 1, 1]
        elif name != "own criterion":  # whose draws have no seed
            assert _flat(values[name]) == pytest.approx(_flat(expected), rel=1e-6, abs=1e-12), name


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}").items()}
    if isinstance(value, list):
        return {k: v for number, inner in enumerate(value) for k, v in _flat(inner, f"{key}.{number}").items()}
    return {key: value}


@pytest.mark.slow
def test_verbs_write_what_one_process_writes(
    folder: Path, alone: object, together: list[tuple[dict[str, Any], dict[str, Tensor]]]
) -> None:
    one, many = folder / "run-1", folder / f"run-{len(together)}"
    assert content(one).keys() == content(many).keys()
    for path in sorted(one.glob("scores/*.safetensors")):
        mine, theirs = Scores.load(path), Scores.load(many / "scores" / path.name)
        assert mine.provenance == theirs.provenance
        for name, expected in mine.importance.items():
            assert float((theirs.importance[name] - expected).norm()) <= 1e-6 * float(expected.norm()), f"{path.name} {name}"
    for path in sorted(one.glob("pruned/*/plan.safetensors")):
        theirs, mine = Plan.load(many / path.relative_to(one)), Plan.load(path)
        assert all(torch.equal(theirs.keep[name], keep) for name, keep in mine.keep.items()), path
        if path.parent.name != "drop":  # whose weights are compensated
            weights = (
                checkpoint.read_tensors(place / path.parent.relative_to(one) / "model.safetensors") for place in (one, many)
            )
            assert all(torch.equal(a, b) for a, b in zip(*(found.values() for found in weights), strict=True))
    for name in ("compare.json", "pruned/auto/eval.json"):
        mine, theirs = (_figures(json.loads((place / name).read_text())) for place in (one, many))
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-7), name
    assert not [path for path in many.rglob(".*") if path.name != ".lock"]


def _figures(record: dict[str, Any]) -> dict[str, float]:
    unsteady = {"cost", "latency", "made_from", "checksum", "zipped"}
    found = _flat({key: value for key, value in record.items() if key not in unsteady})
    return {key: value for key, value in found.items() if isinstance(value, int | float) and "zipped" not in key}


FAILURES = {
    "failing": "rank 1: criterion 'tests.on_ranks:failing' failed: ValueError: no such weight",
    "killed": "another of the 2 processes has ended without a word (killed, or out of memory?); nothing more is written",
    "filling": "{run}/scores/tests..on_ranks...filling.safetensors: could not be written (No space left on device)",
    "hanging": "another of the 2 processes has not answered for 0.05 minutes: it hangs, or does what the others do not",
}
"""What is said, by all ranks together."""


def said(run: Path, *found: Done) -> str:
    assert all(done.code for done in found)
    assert not any(done.out for done in found)
    return "".join(done.err for done in found).replace(str(run), "{run}")


@pytest.mark.slow
@pytest.mark.parametrize("how", FAILURES)
def test_a_rank_that_fails_ends_all_with_its_error(how: str, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    before = content(run)
    found = Ranks(2, CLI, "score", run, "-c", f"tests.on_ranks:{how}", seconds=3 if how == "hanging" else None)
    if how == "hanging":
        found.processes[0].join(60)
        assert (found.processes[0].exitcode, found.processes[1].exitcode) == (1, None)  # whom torchrun kills
    assert said(run, *found.done(2 if how == "hanging" else 60)) == f"prunekit: {FAILURES[how]}\n"
    assert content(run) == before
    assert not list(run.rglob("*.tmp"))
    assert prunekit("score", run, "-c", f"tests.on_ranks:{how}", "--quiet") == 0


@pytest.mark.slow
def test_what_all_see_alike_is_said_once(folder: Path, tmp_path: Path) -> None:
    run = folder / "run"
    for arguments, expected in (
        (("score", run, "-c", "tailor"), "criterion 'tailor' does not exist"),
        (("score", tmp_path / "none", "-c", "taylor"), "not a run folder"),
        (("report", run), "report works in one process, it has nothing to share; start it without torchrun"),
        (
            ("compress", run, "--data", "x.jsonl", "--layerwise", "wanda", "--offload", "--out", tmp_path / "new"),
            "--offload works",
        ),
        (("compare", run, run, "--out", tmp_path / "new"), "--out works at cells in processes of its own"),
    ):
        told = said(run, *Ranks(3, CLI, *arguments).done())
        assert told.count("\n") == 1
        assert told.startswith("prunekit: ")
        assert expected in told


@pytest.mark.slow
def test_an_interrupt_is_said_once(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    before = content(run)
    found = Ranks(2, CLI, "score", run, "-c", "tests.on_ranks:hanging")
    deadline = time.monotonic() + 60
    while not (run / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    while any(process.is_alive() for process in found.processes) and time.monotonic() < deadline + 60:
        time.sleep(1)  # a rank that is not there yet when the signal comes is waited for by the others: press again
        for process in found.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGINT)
    done = found.done(20)
    assert {one.code for one in done} <= {130, 1}
    assert said(run, *done) == "prunekit: interrupted\n"
    assert content(run) == before


@pytest.mark.slow
def test_torchrun_starts_them(folder: Path, tmp_path: Path) -> None:
    """The real thing, once: what is shown and written is the first rank's alone."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunekit"]
    done = subprocess.run([*call, "score", run, "-c", "influence", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert told["criterion"] == "influence"
    assert Scores.load(run / "scores" / "influence.safetensors").digest == told["digest"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "0"}, "MASTER_PORT is ''"),
        ({"RANK": "-1", "MASTER_PORT": "1"}, "RANK is '-1'"),
        ({"RANK": "2", "MASTER_PORT": "1"}, "RANK is 2 of WORLD_SIZE 2"),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    given: dict[str, str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ranks, "_unmet", False)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "", **given}.items():
        monkeypatch.setenv(name, value)
    assert prunekit("score", tmp_path, "-c", "taylor") == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_group_of_the_users_own_shares_nothing_unasked(tmp_path: Path) -> None:
    """A training script's group is there for another reason."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert ranks.met() is None
        assert ranks.size() == 1
        with ranks.joined():
            team = ranks.met()
            assert team is not None
            assert team.group is not None
            assert ranks.rows(torch.ones(2)).tolist() == [1, 1]
            with ranks.apart():
                assert ranks.first()
        assert ranks.met() is None
    finally:
        torch.distributed.destroy_process_group()
