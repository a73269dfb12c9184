"""Trajectories behind fsspec: what is read is what is read from a disk, in pieces; what is recorded comes whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from prunekit import Finetuning, Recorder, Trajectory, checkpoint, finetune, make_plan, score
from prunekit.errors import ArtifactError, UsageError
from prunekit.integrations import Recording
from prunekit.remote import Remote
from tests.stores import LateStore

FILES = {"trajectory.json", "steps.jsonl", "fixed.safetensors", "start.safetensors", "rows.safetensors", "ended.safetensors"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    LateStore.requests.clear()
    LateStore.broken.clear()
    LateStore.fetched = 0
    yield
    LateStore.broken.clear()


def recorded(folder: str | Path, steps: int = 6, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 120), nn.ReLU(), nn.BatchNorm1d(120), nn.Linear(120, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = torch.randn(32, 64), torch.arange(32) % 3
    with Recorder(folder, model, optimizer, **options) as recorder:
        for step in range(steps):
            seen = torch.arange(step, step + 8) % 32
            recorder.batch(seen)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[seen]), y[seen]).backward()
            optimizer.step()
    return model


@pytest.fixture(params=["memory", "late"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty folder."""
    return f"memory://{uuid.uuid4().hex}/t" if request.param == "memory" else f"late://{tmp_path}/store/t"


@pytest.mark.parametrize("states", ["whole", "half"])
def test_what_is_recorded_to_a_store_reads_as_from_a_disk(store: str, states: str, tmp_path: Path) -> None:
    options = {"states": states, "second_moments": True}
    recorded(tmp_path / "local", **options)
    model = recorded(store, **options)
    here, there = Trajectory(tmp_path / "local"), Trajectory(store)
    assert there.complete
    assert there.hash == here.hash
    assert there.bytes == pytest.approx(here.bytes, abs=16)  # the seconds that each took are written there
    there.verify()
    for index in range(len(here) + 1):
        assert torch.equal(there.state(index), here.state(index))
    for ours, theirs in zip(there.segments(survival=True), here.segments(survival=True), strict=True):
        assert torch.equal(ours.data_update, theirs.data_update)
        assert torch.equal(ours.surviving, theirs.surviving)
    assert there.step(3) == here.step(3)
    assert score(there, model, criterion="movement").digest == score(here, model, criterion="movement").digest


def test_the_manifest_comes_last_and_nothing_is_renamed(tmp_path: Path) -> None:
    recorded(f"late://{tmp_path}/t")
    put = [name for what, name in LateStore.requests if what == "put"]
    assert put[-1] == "trajectory.json"
    assert len(put) == len(set(put))
    assert {*put} >= FILES


def test_one_state_is_read_without_the_others(tmp_path: Path) -> None:
    recorded(f"late://{tmp_path}/t", steps=40)
    there = Trajectory(f"late://{tmp_path}/t")
    whole = (tmp_path / "t" / "states-00000.safetensors").stat().st_size
    row = 4 * there.layout.total
    LateStore.fetched = 0
    there.state(20)
    assert row <= LateStore.fetched <= 3 * row
    assert 3 * row < whole / 10


def test_a_store_that_fails_loses_nothing(tmp_path: Path) -> None:
    LateStore.broken.add("steps.jsonl")
    with pytest.raises(ArtifactError, match=r"gone\); everything is kept in ") as said:
        recorded(f"late://{tmp_path}/t")
    assert not (tmp_path / "t" / "trajectory.json").exists()
    with pytest.raises(ArtifactError, match=r"trajectory.json: no such file"):
        Trajectory(f"late://{tmp_path}/t")
    kept = Path(str(said.value).rpartition(" ")[2])
    assert len(Trajectory(kept)) == 6
    shutil.rmtree(kept)


def test_whatever_records_takes_an_address_or_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None makes a folder of this machine of it, whose name is ``memory:``."""
    monkeypatch.chdir(tmp_path)
    store = f"memory://{uuid.uuid4().hex}/t"
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recording = Recording(store)
    recording.begin(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    recording.batch([0])
    optimizer.step()
    recording.end()
    assert len(Trajectory(store)) == 1
    how = Finetuning(lambda at: (torch.ones(1, 2), torch.zeros(1)), 1, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    plan = make_plan(score(Trajectory(store), model, criterion="magnitude"), model, sparsity=0.5)
    with pytest.raises(UsageError, match="recorded in a folder of this machine"):
        finetune(model, plan, how, store, Trajectory(store))
    for make in (lambda place: Recorder(place, model, optimizer), Trajectory, Recording):
        with pytest.raises(UsageError, match="give it as text, with both slashes"):
            make(Path(store))
    assert not list(tmp_path.iterdir())


def test_a_loop_that_fails_leaves_its_steps_there(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        with Recorder(f"late://{tmp_path}/t", model, optimizer) as recorder:
            recorder.without_samples()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    there = Trajectory(f"late://{tmp_path}/t")
    assert (len(there), there.complete) == (1, False)


def test_what_is_there_stays(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(store)
    first = Trajectory(store).hash
    (tmp_path / "spools").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spools"))
    with pytest.raises(ArtifactError, match="already holds a trajectory"):
        recorded(store)
    with pytest.raises(UsageError, match="Protocol not known"):
        recorded("nothing://a/t")
    with pytest.raises(UsageError, match="must hold at least one"):
        Recorder(store, nn.Linear(2, 1), [])
    assert not list((tmp_path / "spools").iterdir())
    assert Trajectory(store).hash == first
    with pytest.raises(UsageError, match="goes on in a folder of this machine"):
        Recorder.resume(store, nn.Linear(2, 1), torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))


@pytest.mark.parametrize("file", sorted({*FILES, "states-00000.safetensors"}))
@pytest.mark.parametrize("change", ["lost", "cut", "changed", "huge header"])
def test_what_was_changed_since_is_told(file: str, change: str, tmp_path: Path) -> None:
    recorded(tmp_path / "t")
    path = tmp_path / "t" / file
    data = path.read_bytes()
    if change == "lost":
        path.unlink()
    elif change == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif change == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    else:
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ArtifactError, match=file.partition("-")[0].partition(".")[0]):
        Trajectory(f"late://{tmp_path}/t").verify()


@pytest.mark.parametrize("metadata", [[1], "text", {"prunekit": 5}, {"prunekit": {"kind": "fixed"}}])
def test_metadata_that_are_no_texts_are_one_line(metadata: Any, tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "fixed.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match=r"fixed.safetensors: not a whole safetensors file"):
        checkpoint.read_header(Remote(f"late://{tmp_path}/fixed.safetensors"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://a/t", "Protocol not known"),
        ("late:///", "names no folder there; give one, as in late://bucket/"),
        ("memory://no-such/t", "no such file"),
        ("late:///no/such", "no such file"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(url: str, said: str) -> None:
    with pytest.raises((ArtifactError, UsageError), match=said) as error:
        Trajectory(url)
    assert "\n" not in str(error.value)


def test_a_store_that_is_lost_while_reading_is_one_line(tmp_path: Path) -> None:
    recorded(tmp_path / "t", steps=40)
    there = Trajectory(f"late://{tmp_path}/t")
    there.state(0)
    LateStore.broken.add("states-00000.safetensors")
    with pytest.raises(ArtifactError, match=r"states-00000.safetensors: cannot be read \(ConnectionError: gone\)"):
        there.state(39)


def test_memory_holds_no_more_than_was_put() -> None:
    recorded("memory://whole/t")
    assert {path.rpartition("/")[2] for path in fsspec.filesystem("memory").find("/whole")} == {
        *FILES, "states-00000.safetensors",
    }  # fmt: skip
