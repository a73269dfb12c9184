"""What was recorded is what happened, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from prunekit import ArtifactError, NonFiniteError, PrunekitError, Recorder, Trajectory, checkpoint
from prunekit.trajectory import store
from tests.conftest import TinyNet, record, tiny_data


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_state_learning_rate_and_batch_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK_BYTES", 3 * 46 * 4)  # three states a file: rows cross files
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    x, y = tiny_data(20)
    states, rates, seen = [flat(model)], [], []
    with Recorder(tmp_path / "t", model, optimizer) as recorder:
        for step in range(8):
            indices = torch.randperm(20)[: 5 + step % 2]
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            recorder.batch(indices)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            states.append(flat(model))
            seen.append(tuple(indices.tolist()))
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 8
    assert trajectory.complete
    for index, state in enumerate(states):
        assert torch.equal(trajectory.state(index), state)
    assert torch.equal(trajectory.state(-1), states[-1])
    assert [trajectory.step(s).groups[0]["lr"] for s in range(8)] == rates
    assert [trajectory.step(s).batches for s in range(8)] == [(b,) for b in seen]
    blocks = sorted((tmp_path / "t").glob("states-*.safetensors"))
    assert torch.equal(torch.cat([load_file(b)["states"] for b in blocks]), torch.stack(states))


def test_states_cost_four_bytes_a_coordinate(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    trajectory = record(
        tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), 20, (torch.randn(24, 100), torch.zeros(24).long())
    )
    size = sum(p.stat().st_size for p in trajectory.folder.glob("states-*"))
    assert size == 21 * 4 * trajectory.layout.total + store.HEADER_BYTES


def test_hash_is_the_contents(tmp_path: Path) -> None:
    runs = []
    for name, rate in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        torch.manual_seed(3)
        model = TinyNet()
        runs.append(record(tmp_path / name, model, torch.optim.SGD(model.parameters(), lr=rate)))
    assert runs[0].hash == runs[1].hash != runs[2].hash
    assert runs[0].hash == runs[0]._states.digest()


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    recorded = TinyNet()
    record(tmp_path / "t", recorded, torch.optim.AdamW(recorded.parameters(), lr=0.01))
    torch.manual_seed(3)
    plain = TinyNet()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    x, y = tiny_data(24)
    for step in range(12):
        indices = torch.arange(step * 8, step * 8 + 8) % 24
        optimizer.zero_grad()
        F.cross_entropy(plain(x[indices]), y[indices]).backward()
        optimizer.step()
    assert torch.equal(flat(recorded), flat(plain))


def test_buffers_and_frozen_parameters_have_their_place(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    model[1].requires_grad_(False)
    trajectory = record(tmp_path / "t", model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    kinds = {entry.name: entry.kind for entry in trajectory.layout}
    assert kinds == {
        "2.weight": "parameter", "2.bias": "parameter", "4.weight": "parameter", "4.bias": "parameter",
        "2.running_mean": "buffer", "2.running_var": "buffer",
    }  # fmt: skip
    assert set(trajectory.fixed) == {"1.weight", "1.bias", "2.num_batches_tracked"}
    state = trajectory.model_state()
    assert torch.equal(state["2.running_mean"], model[2].running_mean)
    assert torch.equal(state["1.weight"], model[1].weight)


def test_parameters_without_gradient_are_noted(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with Recorder(tmp_path / "t", model, optimizer):
        model["used"](torch.ones(1, 2)).sum().backward()
        optimizer.step()
    trajectory = Trajectory(tmp_path / "t")
    assert trajectory.step(0).without_gradient == {"idle.weight", "idle.bias"}
    segment = next(iter(trajectory.segments()))
    views = trajectory.layout.views(segment.regularisation)
    assert not views["idle.weight"].any()
    assert views["used.weight"].any()


def test_a_second_recording_does_not_touch_the_first(tmp_path: Path) -> None:
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = record(tmp_path / "t", model, optimizer)
    with pytest.raises(ArtifactError, match="already holds a trajectory"):
        Recorder(tmp_path / "t", model, optimizer).__enter__()
    assert Trajectory(tmp_path / "t").hash == first.hash


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(TinyNet().parameters(), lr=0.1)
    with pytest.raises(PrunekitError, match="not the model's"):
        Recorder(tmp_path / "t", TinyNet(), optimizer).__enter__()


def test_nan_stops_the_recording_and_names_the_weight(tmp_path: Path) -> None:
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match=r"step 2: head\.weight"), Recorder(tmp_path / "t", model, optimizer):  # noqa: PT012
        for step in range(50):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            if step == 2:
                model.head.weight.grad[0, 0] = float("nan")
            optimizer.step()
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 2
    assert not trajectory.complete


def test_a_full_disk_stops_it_and_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    model = TinyNet()
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ArtifactError, match=r"No space left.*can be read"):
        record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), 500)
    monkeypatch.undo()
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 4  # a header and the start, then four steps
    assert not trajectory.complete
    assert torch.isfinite(trajectory.state(4)).all()


def test_an_exception_in_the_loop_is_the_users_own(tmp_path: Path) -> None:
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), Recorder(tmp_path / "t", model, optimizer):  # noqa: PT012
        optimizer.step()
        raise KeyError("mine")
    assert not Trajectory(tmp_path / "t").complete


def unsealed(folder: Path, **changes: object) -> None:
    """As a prunekit without checksums wrote it."""
    header = {**checkpoint.read_json(folder / "trajectory.json"), **changes}
    (folder / "trajectory.json").write_text(json.dumps({key: value for key, value in header.items() if key != "files"}))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("states", ["whole", "half"])
def test_every_file_of_a_recording_proves_itself(tmp_path: Path, states: str) -> None:
    model = TinyNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    recorded = record(tmp_path / "t", model, optimizer, states=states, second_moments=True)
    recorded.verify()
    for path in sorted((tmp_path / "t").iterdir()):
        size = path.stat().st_size
        for place in (size - 2, min(store.HEADER_BYTES + 5, size - 1)):
            flip(path, place)
            with pytest.raises(ArtifactError, match=re.escape(path.name)):
                Trajectory(tmp_path / "t").verify()
            flip(path, place)
    Trajectory(tmp_path / "t").verify()


def test_a_row_is_proved_when_it_is_read(tmp_path: Path) -> None:
    model = TinyNet()
    record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    path = tmp_path / "t" / "states-00000.safetensors"
    flip(path, store.HEADER_BYTES + 4 * 46 * 5)
    trajectory = Trajectory(tmp_path / "t")
    trajectory.state(4)
    with pytest.raises(ArtifactError, match=r"row 5 was changed after it was recorded \(its checksum is \w{16}, it was"):
        trajectory.state(5)


@pytest.mark.parametrize("name", ["states-00000.safetensors", "steps.jsonl", "trajectory.json"])
def test_truncated_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    model = TinyNet()
    record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    path = tmp_path / "t" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=name):
        Trajectory(tmp_path / "t").state(-1)


def test_a_step_that_is_not_whole_does_not_count(tmp_path: Path) -> None:
    model = TinyNet()
    record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    unsealed(tmp_path / "t", complete=False)  # as a killed process leaves it
    log = tmp_path / "t" / "steps.jsonl"
    log.write_text(log.read_text()[:-5])
    assert len(Trajectory(tmp_path / "t")) == 11


def test_nan_in_a_stored_state_is_refused(tmp_path: Path) -> None:
    model = TinyNet()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    path = tmp_path / "t" / "states-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[store.HEADER_BYTES + 4 * 46 * 5 : store.HEADER_BYTES + 4 * 46 * 5 + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(bytes(content))
    unsealed(tmp_path / "t")
    trajectory = Trajectory(tmp_path / "t")
    with pytest.raises(NonFiniteError, match=r"state 5 has NaN or Inf in conv\.weight"):
        list(trajectory.segments())
