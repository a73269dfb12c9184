"""A recording killed at any moment opens up to its last whole step, and goes on to the same final weights."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import ArtifactError, NonFiniteError, Recorder, Trajectory
from tests.conftest import TinyNet, record, tiny_data
from tests.trajectory.killed import STEPS, loop

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "tests.trajectory.killed"])  # pytest: the main module, which a child imports too


def start(folder: Path, options: dict[str, Any], pause: float) -> tuple[BaseProcess, Connection]:
    """The process that records, and where it says which step comes next."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=loop, args=(folder, options, pause, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def finish(folder: Path, options: dict[str, Any]) -> Trajectory:
    process, _steps = start(folder, options, 0)
    process.join()
    assert process.exitcode == 0
    return Trajectory(folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"every": 3, "second_moments": True}, {"states": "half"}], ids=str)
def test_kill_at_random_moments(tmp_path: Path, options: dict[str, Any]) -> None:
    """Seven kills for each way of recording, 21 in all, each followed by a look and a resumption."""
    whole = finish(tmp_path / "whole", options)
    draw = random.Random(str(options))
    folder = tmp_path / "killed"
    furthest = 0
    for _ in range(7):
        process, steps = start(folder, options, 0.004)
        begun = steps.recv()
        assert begun >= furthest - 7 - 1  # a snapshot every 7 steps
        for _ in range(draw.randrange(20)):  # steps, so that a busy machine gets as far
            steps.recv()
        time.sleep(draw.uniform(0.0, 0.008))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        cut = Trajectory(folder)
        assert not cut.complete
        assert begun - 2 <= len(cut) <= STEPS
        assert len(cut) == 0 or (folder / "snapshot.safetensors").exists()
        furthest = max(furthest, len(cut) // 7 * 7)
        for index in range(0, len(cut) + 1, 5):
            torch.testing.assert_close(cut.state(index), whole.state(index), rtol=0, atol=0)
    assert furthest > 20
    again = finish(folder, options)
    assert again.complete
    assert len(again) == STEPS
    assert again.hash == whole.hash
    assert [again.step(s) for s in range(STEPS)] == [whole.step(s) for s in range(STEPS)]
    assert torch.equal(again.state(-1), whole.state(-1))
    for index in (0, 77, STEPS - 1):
        one, two = again.random_states(index), whole.random_states(index)
        assert one is not None
        assert two is not None
        assert torch.equal(one[0], two[0])


def test_an_interrupted_loop_can_go_on(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, stop: int) -> None:
        x, y = tiny_data(24)
        with recorder:
            for step in range(recorder.steps, 30):
                if step == stop:
                    raise KeyboardInterrupt
                indices = torch.arange(step, step + 8) % 24
                optimizer.zero_grad()
                F.cross_entropy(model(x[indices]), y[indices]).backward()
                recorder.batch(indices)
                optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(5)
        model = TinyNet()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    model, optimizer = fresh()
    loop(Recorder(tmp_path / "whole", model, optimizer), model, optimizer, -1)
    model, optimizer = fresh()
    with pytest.raises(KeyboardInterrupt):
        loop(Recorder(tmp_path / "cut", model, optimizer, snapshot_every=10), model, optimizer, 17)
    assert len(Trajectory(tmp_path / "cut")) == 17
    model, optimizer = fresh()
    with torch.no_grad():
        model.head.weight.fill_(3)  # whatever it holds is replaced
    recorder = Recorder.resume(tmp_path / "cut", model, optimizer)
    assert recorder.steps == 10
    loop(recorder, model, optimizer, -1)
    assert Trajectory(tmp_path / "cut").hash == Trajectory(tmp_path / "whole").hash
    with pytest.raises(ArtifactError, match="complete after 30 steps"):
        Recorder.resume(tmp_path / "cut", model, optimizer)


def test_resuming_needs_the_same_model(tmp_path: Path) -> None:
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError), Recorder(tmp_path / "t", model, optimizer):  # noqa: PT012
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
    other = nn.Linear(3, 3)
    with pytest.raises(ArtifactError, match="not the recorded one"):
        Recorder.resume(tmp_path / "t", other, torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("every", [2, 5])
def test_every_kth_state(tmp_path: Path, every: int) -> None:
    def made(name: str, **options: int) -> Trajectory:
        torch.manual_seed(2)
        model = TinyNet().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        x, y = tiny_data(24, torch.float64)
        with Recorder(tmp_path / name, model, optimizer, **options) as recorder:
            for step in range(12):
                indices = torch.arange(step, step + 8) % 24
                optimizer.zero_grad()
                F.cross_entropy(model(x[indices]), y[indices]).backward()
                recorder.batch(indices)
                optimizer.step()
        return Trajectory(tmp_path / name)

    all_states, some = made("all"), made("some", every=every)
    assert len(some) == 12
    assert some.pieces == -(-12 // every)
    for index in [*range(0, 13, every), 12]:
        assert torch.equal(some.state(index), all_states.state(index))
    assert sum(s.steps for s in some.segments()) == 12
    merged, exact = list(some.segments()), list(all_states.segments(every))
    for one, two in zip(merged, exact, strict=True):
        assert torch.equal(one.update, two.update)
        # between kept states decay acts on the straight line instead of the path: close, not equal
        assert (one.regularisation - two.regularisation).norm() < 0.05 * two.regularisation.norm()


@pytest.mark.slow
def test_half_precision_differences(tmp_path: Path) -> None:
    def made(name: str, states: str) -> Trajectory:
        torch.manual_seed(2)
        model = TinyNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = tiny_data(24)
        with Recorder(tmp_path / name, model, optimizer, states=states) as recorder:  # type: ignore[arg-type]
            for step in range(200):
                indices = torch.arange(step, step + 8) % 24
                optimizer.zero_grad()
                F.cross_entropy(model(data[0][indices]), data[1][indices]).backward()
                recorder.batch(indices)
                optimizer.step()
        return Trajectory(tmp_path / name)

    whole, half = made("whole", "whole"), made("half", "half")
    size = {name: sum(p.stat().st_size for p in (tmp_path / name).glob("*-0*.safetensors")) for name in ("whole", "half")}
    assert size["half"] < 0.55 * size["whole"] + 201 * 8 + 3 * 256
    for index in (0, 1, 63, 64, 65, 130, 199, 200, 3, 90):
        step = (whole.state(min(index + 1, 200)) - whole.state(max(index - 1, 0))).abs().max()
        assert (half.state(index) - whole.state(index)).abs().max() < 2e-3 * step  # errors do not add up
    for one, two in zip(whole.segments(), half.segments(), strict=True):
        assert (one.update - two.update).norm() < 2e-3 * one.update.norm()


def test_states_are_the_same_hash_when_read_again(tmp_path: Path) -> None:
    model = TinyNet()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), 130)
    assert trajectory._states.digest() == trajectory.hash


def test_a_complete_recording_stays_whole_until_its_loop_goes_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record(tmp_path / "t", model, optimizer, steps=4)
    held = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    assert "ended.safetensors" in held
    recorder = Recorder.resume(tmp_path / "t", model, optimizer, taken=4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == held
    with recorder:
        assert not Trajectory(tmp_path / "t").complete
        assert not (tmp_path / "t" / "ended.safetensors").exists()
    assert Trajectory(tmp_path / "t").complete
    assert len(Trajectory(tmp_path / "t")) == 4
