"""Nothing moves unseen: the recording ends where the model does, or says by name why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import ArtifactError, Recorder, Trajectory, UsageError
from prunekit.trajectory import replay
from tests.conftest import TinyNet, tiny_data
from tests.kernel.test_datawise import batch, identities


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def loop(
    model: nn.Module, optimizer: Any, folder: Path, between: Callable[[int], object] = lambda step: None, **options: Any
) -> Trajectory:
    x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    several = optimizer if isinstance(optimizer, list) else [optimizer]
    with Recorder(folder, model, optimizer, **options) as recorder:
        for step in range(6):
            between(step)
            for one in several:
                one.zero_grad()
            F.cross_entropy(model(x), y).backward()
            recorder.batch(range(16))
            for one in several:
                one.step()
    return Trajectory(folder)


def same(trajectory: Trajectory, model: nn.Module) -> None:
    state = trajectory.model_state()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_the_last_state_is_the_trained_model_counters_included(tmp_path: Path) -> None:
    model = net()
    trajectory = loop(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "t")
    same(trajectory, model)
    assert int(trajectory.model_state()["1.num_batches_tracked"]) == 6
    assert int(trajectory.model_state(0)["1.num_batches_tracked"]) == 0
    assert len(trajectory) == 6


def test_a_parameter_that_is_unfrozen_is_refused_by_name(tmp_path: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match=r"0\.weight was frozen"):
        loop(model, optimizer, tmp_path / "t", lambda step: model[0].requires_grad_(step >= 3))
    trajectory = Trajectory(tmp_path / "t")
    assert not trajectory.complete
    assert len(trajectory) == 3


def test_an_added_group_of_frozen_parameters_is_refused_and_of_recorded_ones_taken_in(tmp_path: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), 0.1)

    def unfreeze(step: int) -> None:
        if step == 3:
            optimizer.add_param_group({"params": model[0].requires_grad_(True).parameters(), "lr": 0.01})

    with pytest.raises(UsageError, match=r"0\.weight was frozen"):
        loop(model, optimizer, tmp_path / "frozen", unfreeze)
    model = net()
    optimizer = torch.optim.SGD(model[3].parameters(), 0.1, weight_decay=0.1)
    trajectory = loop(model, optimizer, tmp_path / "free", unfreeze)
    same(trajectory, model)
    assert [len(trajectory.step(s).groups) for s in range(6)] == [1, 1, 1, 2, 2, 2]
    moved = [trajectory.layout.views(piece.update)["0.weight"].any().item() for piece in trajectory.segments()]
    assert moved == [False] * 3 + [True] * 3
    decayed = [trajectory.layout.views(piece.regularisation)["0.weight"].any().item() for piece in trajectory.segments()]
    assert decayed == moved


@pytest.mark.parametrize("how", ["data", "optimizer", "no_grad"])
def test_a_frozen_parameter_that_moves_all_the_same_is_refused(tmp_path: Path, how: str) -> None:
    model = net()
    model[0].requires_grad_(False)

    def move(step: int) -> None:
        if how == "data":
            model[0].weight.data = model[0].weight.data + 1
        elif how == "no_grad":
            model[0].weight.add_(1)
        else:
            other = torch.optim.SGD(model[0].requires_grad_(True).parameters(), 0.1)
            model[0].weight.grad = torch.ones_like(model[0].weight)
            other.step()
            model[0].weight.grad = None
            model[0].requires_grad_(False)

    with pytest.raises(UsageError, match=r"0\.weight was frozen when recording began and has moved"):
        loop(model, torch.optim.SGD(model[3].parameters(), 0.1), tmp_path / "t", move)
    assert not Trajectory(tmp_path / "t").complete


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("how", ["copy", "swap", "second optimizer", "at the end"])
def test_weights_that_something_else_moves_are_a_piece_of_the_path(tmp_path: Path, how: str, every: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model[3].parameters(), 0.1)
    other = torch.optim.SGD(model[0].parameters(), 0.1)

    def move(step: int) -> None:
        if step not in (2, 5):
            return
        if how == "copy":
            model[0].weight.data.mul_(0.9)
        elif how == "swap":
            model[3].weight.data = model[3].weight.data.clone() * 0.9
        elif how == "second optimizer":
            other.step()

    if how == "at the end":
        with Recorder(tmp_path / "t", model, optimizer, every=every):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            nn.init.ones_(model[0].weight)
        trajectory, sets = Trajectory(tmp_path / "t"), 1
    else:
        with pytest.warns(UserWarning, match=r"moved between two steps.*record both"):
            trajectory = loop(model, optimizer, tmp_path / "t", move, every=every)
        sets = 2
    same(trajectory, model)
    assert sum(not trajectory.step(s).moved for s in range(len(trajectory))) == sets
    total = sum(piece.update for piece in trajectory.segments())
    torch.testing.assert_close(trajectory.state(0) + total, trajectory.state(-1))


def test_an_idle_parameter_without_optimizer_is_fine_and_a_replaced_one_is_not(tmp_path: Path) -> None:
    model = net()
    trajectory = loop(model, torch.optim.SGD(model[3].parameters(), 0.1), tmp_path / "idle")
    same(trajectory, model)
    assert len(trajectory) == 6


@pytest.mark.parametrize(
    ("new", "fault"),
    [
        (lambda: nn.Linear(8, 4), r"3\.weight was \(3, 8\) when recording began and is \(4, 8\) now"),
        (lambda: nn.Identity(), r"3\.weight was \(3, 8\) when recording began and is gone now"),
        (lambda: nn.Sequential(nn.Linear(8, 3)), r"3\.0\.weight was not in the model"),
    ],
)
def test_a_layer_that_is_replaced_is_refused(tmp_path: Path, new: Callable[[], nn.Module], fault: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ArtifactError, match=fault), Recorder(tmp_path / "t", model, optimizer):
        model[3] = new()
    assert not Trajectory(tmp_path / "t").complete


def test_recording_copies_of_the_model_is_not_disturbed(tmp_path: Path) -> None:
    model, copies = net(), []
    loop(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "t", lambda step: copies.append(copy.deepcopy(model)))
    assert not any(p._backward_hooks for p in copies[-1].parameters())
    assert not any(p._backward_hooks for p in model.parameters())


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["on one pass", "in turns", "one rarely"])
@pytest.mark.parametrize(("first", "second"), [("sgd", "sgd"), ("sgd", "adamw"), ("adamw", "adamw")])
def test_two_optimizers_on_one_path(tmp_path: Path, first: str, second: str, order: str) -> None:
    """A step of either is a step of the path, and every step's samples add up to what its parameters did."""
    model = TinyNet().double()
    pair = [KINDS[first](model.conv.parameters()), KINDS[second](model.head.parameters())]

    def run(recorder: Recorder) -> int:
        taken = 0
        for step in range(8):
            stepping = {"on one pass": pair, "in turns": [pair[step % 2]], "one rarely": pair if step % 3 == 0 else pair[:1]}
            indices = torch.arange(step * 7, step * 7 + 5 + step % 3) % 24
            model.zero_grad()
            x, y = batch(indices)
            F.cross_entropy(model(x), y).backward()
            recorder.batch(indices)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            recorder.gradient_scale(min(1.0, 0.3 / (float(norm) + 1e-6)))
            for one in stepping[order]:
                one.step()
                taken += 1
        return taken

    with Recorder(tmp_path / "t", model, pair, second_moments=True) as recorder:
        taken = run(recorder)
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == taken
    same(trajectory, model)
    identities(trajectory, model)
    if order == "on one pass":
        assert [trajectory.step(s).behind for s in range(4)] == [0, 1, 0, 1]
    again = TinyNet().double()
    others = [KINDS[first](again.conv.parameters()), KINDS[second](again.head.parameters())]
    found = replay(trajectory, again, others, batch, F.cross_entropy, tmp_path / "again")
    torch.testing.assert_close(found.state(-1), trajectory.state(-1), atol=1e-12, rtol=0)


def test_a_parameter_of_two_optimizers_is_refused(tmp_path: Path) -> None:
    model = TinyNet()
    pair = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.head.parameters(), 0.1)]
    with pytest.raises(UsageError, match=r"head\.weight is held by two"):
        Recorder(tmp_path / "t", model, pair).__enter__()


def test_two_optimizers_go_on_after_a_crash(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None) -> nn.Module:
        model = net()
        pair = [torch.optim.AdamW(model[0].parameters(), 0.1), torch.optim.SGD(model[3].parameters(), 0.1, momentum=0.9)]
        scheduler = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in pair]
        if (folder / "trajectory.json").exists():
            recorder = Recorder.resume(folder, model, pair, scheduler)
        else:
            recorder = Recorder(folder, model, pair, scheduler=scheduler, snapshot_every=4)
        x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
        with recorder:
            for step in range(recorder.steps // 2, 8):
                if step == stop:
                    raise KeyboardInterrupt
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                for one, schedule in zip(pair, scheduler, strict=True):
                    one.step()
                    schedule.step()
                if step == 1:
                    model[0].weight.data.mul_(0.5)
        return model

    with pytest.warns(UserWarning, match="moved between two steps"):
        whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="moved between two steps"):
        run(tmp_path / "cut", 5)
    resumed = run(tmp_path / "cut", None)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert Trajectory(tmp_path / "cut").hash == Trajectory(tmp_path / "whole").hash
    assert len(Trajectory(tmp_path / "cut")) == 17


@pytest.mark.slow
@pytest.mark.parametrize("noted", ["before", "after", "before zero_grad"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused"])
def test_steps_that_a_scaler_skips_leave_nothing_behind(tmp_path: Path, kind: str, micro: int, noted: str) -> None:
    model = TinyNet().double()
    fused = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.3, fused=True) if kind == "fused" else None
    optimizer = fused or KINDS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    with Recorder(tmp_path / "t", model, optimizer, second_moments=True) as recorder:
        for step in range(8):
            parts = [torch.arange(step * 7 + m * 3, step * 7 + m * 3 + 5) % 24 for m in range(micro)]
            for m, indices in enumerate(parts):
                if noted == "before zero_grad":
                    recorder.batch(indices)
                if m == 0:
                    optimizer.zero_grad()
                if noted == "before":
                    recorder.batch(indices)
                x, y = batch(indices)
                scaler.scale(F.cross_entropy(model(x), y) / micro).backward()
                if noted == "after":
                    recorder.batch(indices)
            if step in (0, 3, 4):
                model.conv.weight.grad[0, 0] = float("inf")
            else:
                seen.append(tuple(tuple(part.tolist()) for part in parts))
            scaler.step(optimizer)
            scaler.update()
    trajectory = Trajectory(tmp_path / "t")
    assert [trajectory.step(s).batches for s in range(len(trajectory))] == seen
    same(trajectory, model)
    identities(trajectory, model)


def test_dropout_is_replayed_though_steps_were_skipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Dropout(0.4), nn.Tanh(), nn.Linear(12, 4)).double()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = tiny_data(24, torch.float64)
    with Recorder(tmp_path / "t", model, optimizer, second_moments=True) as recorder:
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x[:8]), y[:8])).backward()
            recorder.batch(range(8))
            if step in (1, 2):
                model[1].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 4
    identities(trajectory, model)
