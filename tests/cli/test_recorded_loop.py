"""A plain training loop that was recorded becomes a run, and every verb works on it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prunekit import ArtifactError, Recorder, Run, Trajectory, UsageError, score
from tests.cli.conftest import Cli

HERE = __name__
IMPORT = ("import", "--model", f"{HERE}:build", "--data", f"{HERE}:data")


def build(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def data(train: int = 32) -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    y = x[:, 0].gt(0).long()
    ends = {"train": (0, train), "validation": (32, 56), "test": (56, 80), "scoring": (80, 96)}
    return {name: (x[a:b], y[a:b]) for name, (a, b) in ends.items()}


def record(folder: Path, cut_off: bool = False, noted: bool = True) -> nn.Module:
    """Four epochs of a loop over a shuffled DataLoader; returns the trained model."""
    torch.manual_seed(0)
    model = build()
    loader = DataLoader(TensorDataset(*data()["train"]), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.02)
    with Recorder(folder, model, optimizer, {"what": "a loop"}, second_moments=True) as recorder:
        for epoch in range(4):
            for x, y in recorder.watch(loader) if noted else loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if cut_off and epoch == 1:
                recorder.flush()
                shutil.copytree(folder, folder.with_name("cut"))
    return model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "trajectory"
    record(folder, cut_off=True)
    return folder


@pytest.mark.slow
def test_every_verb_works_on_it(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    """Seven verbs one after another, each on what the others wrote: this takes some seconds."""
    run = tmp_path / "run"
    few = {"sparsities": [0.5], "allocations": ["global"], "structures": ["unstructured"]}
    Run.from_recording(run, recorded, model=build, data=data, compare=few, eval={"latency_batches": [1], "samples": 16})
    assert cli("score", run, "-c", "influence", "-c", "magnitude", "-c", "taylor").code == 0
    found = json.loads(cli("explain", run, "sample", "3", "--json").out)
    assert "note" not in found["training"]  # samples are named, and second moments are there
    assert cli("explain", run, "layer", "0").code == 0
    assert cli("compare", run).code == 0
    assert cli("prune", run, "-c", "influence", "-s", "0.5", "--name", "once").code == 0
    tuned = cli("prune", run, "-c", "magnitude", "-s", "0.5", "--finetune", "1", "--name", "tuned")
    assert tuned.code == 0, tuned.err
    assert cli("eval", run / "pruned/tuned").code == 0
    page = cli("report", run)
    assert (page.code, page.err) == (0, "")
    assert "The run has no train.json" in (run / "report.html").read_text()
    info = json.loads(cli("info", run, "--json").out)
    assert info["trajectory"]["made_from"]["noted"] == {"what": "a loop"}


def test_a_loop_s_own_training_is_what_fine_tuning_takes_over(recorded: Path, tmp_path: Path) -> None:
    train = Run.from_recording(tmp_path / "run", recorded, model=build, data=data).recipe.train
    assert (train.optimizer.name, train.optimizer.lr, train.optimizer.weight_decay) == ("adamw", 0.03, 0.02)
    assert (train.batch_size, train.epochs, train.schedule.name, train.record.second_moments) == (8, 4, "constant", True)


def test_rewinding_needs_a_training_of_prunekit_s_own(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    Run.from_recording(tmp_path / "run", recorded, model=build, data=data)
    assert cli("score", tmp_path / "run", "-c", "magnitude").code == 0
    done = cli("prune", tmp_path / "run", "-c", "magnitude", "-s", "0.5", "--rewind", "4")
    assert done.code == 2
    assert "--rewind needs a training of prunekit's own" in done.err


def test_fine_tuning_without_data_says_what_it_lacks(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    run = Run.from_recording(tmp_path / "run", recorded, model=build)
    assert run.recipe.data is None
    assert cli("score", tmp_path / "run", "-c", "magnitude").code == 0
    done = cli("prune", tmp_path / "run", "-c", "magnitude", "-s", "0.5", "--finetune", "1")
    assert done.code == 1
    assert "this run has no data" in done.err
    assert "--data" in done.err


def test_the_recording_stays_and_takes_no_room_twice(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in recorded.iterdir()}
    linked = Run.from_recording(tmp_path / "linked", recorded, model=build, data=data)
    for path in (tmp_path / "linked/trajectory").iterdir():
        assert path.name == "trajectory.json" or path.samefile(recorded / path.name)

    def refused(*paths: object, **options: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    copied = Run.from_recording(tmp_path / "copied", recorded, model=f"{HERE}:build", data=f"{HERE}:data")
    copied.trajectory.verify()
    assert not any(path.samefile(recorded / path.name) for path in copied.trajectory.folder.iterdir())
    assert {path.name: path.read_bytes() for path in recorded.iterdir()} == before
    assert linked.trajectory.hash == copied.trajectory.hash == Trajectory(recorded).hash
    x, y = data()["scoring"]
    own, of_run = (score(t, linked.model, [(x, y)]).importance for t in (Trajectory(recorded), copied.trajectory))
    assert all(torch.equal(own[name], of_run[name]) for name in own)


def test_a_run_is_made_around_a_recording_that_lies_in_place(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "trajectory")
    (tmp_path / "trajectory/notes.txt").write_text("mine")
    arguments = (*IMPORT, "--trajectory", tmp_path / "trajectory", "--out", tmp_path)
    first, second = cli(*arguments), cli(*arguments)
    assert (first.code, second.code, first.err) == (0, 0, "")
    assert first.out == "import: 44 coordinates, a recorded path of 16 steps, task classification\n"
    assert "reused" in second.out
    assert (tmp_path / "trajectory/notes.txt").exists()
    assert len(Run(str(tmp_path)).trajectory) == 16


def test_the_same_again_is_reused_and_something_else_refused(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    arguments = (*IMPORT, "--trajectory", recorded, "--out", tmp_path / "run")
    assert cli(*arguments).code == 0
    assert "reused" in cli(*arguments).out
    record(tmp_path / "other", noted=False)
    other = (*IMPORT, "--trajectory", tmp_path / "other", "--out", tmp_path / "run")
    refused = cli(*other)
    assert refused.code == 1
    assert "made from other inputs" in refused.err
    assert cli(*other, "--overwrite").code == 0
    again = cli(*IMPORT, "--trajectory", tmp_path / "run/trajectory", "--out", tmp_path / "second")  # a run's own, once more
    assert again.code == 0, again.err


def damaged(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    path = place / "states-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return place


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another width": ({"model_args": {"width": 7}}, ArtifactError, r"0\.weight has shape \(7, 4\), recorded \(6, 4\)"),
    "too few samples": (
        {"data_args": {"train": 20}},
        UsageError,
        "the train split has 20; its samples must be those of the loop",
    ),
    "a lambda": ({"model": lambda: build()}, UsageError, "cannot be imported by later commands"),
    "no such module": ({"model": "nowhere:build"}, UsageError, "nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_or_other_data_are_refused(recorded: Path, tmp_path: Path, name: str) -> None:
    changes, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        Run.from_recording(tmp_path / "run", recorded, **{"model": build, "data": data, **changes})
    assert not (tmp_path / "run").exists()


def test_what_is_no_whole_recording_is_refused(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(ArtifactError) as error:
            Run.from_recording(tmp_path / "run", folder, model=build, data=data)
        return str(error.value)

    assert "cut off after 8 steps; go on with Recorder.resume" in told(recorded.with_name("cut"))
    assert "no trajectory there" in told(tmp_path)
    assert "states-00000" in told(damaged(recorded, tmp_path / "damaged"))
    both = cli(*IMPORT, "--trajectory", recorded, "--weights", "w.safetensors", "--out", tmp_path / "run")
    neither = cli(*IMPORT, "--out", tmp_path / "run")
    assert both.code == neither.code == 2
    assert both.err == neither.err
