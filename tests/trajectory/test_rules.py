"""The decay share of a step, against the optimizers themselves."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunekit import Recorder, Trajectory
from prunekit.trajectory.rules import RULES, start_counts
from tests.conftest import TinyNet, record

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}),
    "adam without decay": (torch.optim.Adam, {"lr": 0.1}),
    "adam, decoupled": (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_data_the_whole_step_is_decay(tmp_path: Path, name: str) -> None:
    """Zero gradients: whatever moves the weights is regularisation, so U must vanish."""
    cls, options = OPTIMIZERS[name]
    model = TinyNet().double()
    optimizer = cls(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with Recorder(tmp_path / "t", model, optimizer):
        for _ in range(6):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            schedule.step()
    for segment in Trajectory(tmp_path / "t").segments():
        assert segment.update.abs().max() > 0 or options.get("weight_decay", 0) == 0
        torch.testing.assert_close(segment.data_update, torch.zeros_like(segment.update), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["sgd", "momentum", "dampening", "nesterov"])
def test_with_data_sgd_is_linear_in_its_two_parts(tmp_path: Path, name: str) -> None:
    """SGD's move is linear in gradient + λθ: feeding it the data's gradient alone gives U."""
    cls, options = OPTIMIZERS[name]
    model = TinyNet().double()
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(6)]
    optimizer = cls(model.parameters(), **options)
    with Recorder(tmp_path / "t", model, optimizer):
        for step in gradients:
            for p, g in zip(model.parameters(), step, strict=True):
                p.grad = g.clone()
            optimizer.step()
    twin = TinyNet().double()
    plain = cls(twin.parameters(), **{**options, "weight_decay": 0})
    for segment, step in zip(Trajectory(tmp_path / "t").segments(), gradients, strict=True):
        before = torch.cat([p.detach().flatten().clone() for p in twin.parameters()])
        for p, g in zip(twin.parameters(), step, strict=True):
            p.grad = g.clone()
        plain.step()
        moved = torch.cat([p.detach().flatten() for p in twin.parameters()]) - before
        torch.testing.assert_close(segment.data_update, moved, atol=1e-12, rtol=0)


def test_groups_have_their_own_rate_and_decay(tmp_path: Path) -> None:
    model = TinyNet().double()
    optimizer = torch.optim.AdamW(
        [{"params": model.conv.parameters(), "lr": 0.3, "weight_decay": 0.5}, {"params": model.head.parameters()}],
        lr=0.1,
        weight_decay=0.0,
    )
    trajectory = record(tmp_path / "t", model, optimizer, 2)
    segment = next(iter(trajectory.segments()))
    share, start = trajectory.layout.views(segment.regularisation), trajectory.layout.views(segment.start)
    torch.testing.assert_close(share["conv.weight"], -0.15 * start["conv.weight"])
    assert not share["head.weight"].any()


def test_merged_pieces_add_up(tmp_path: Path) -> None:
    model = TinyNet().double()
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), 11)
    single, merged = list(trajectory.segments()), list(trajectory.segments(4))
    assert [m.index for m in merged] == [0, 4, 8]
    torch.testing.assert_close(
        torch.stack([m.regularisation for m in merged]).sum(0), torch.stack([s.regularisation for s in single]).sum(0)
    )
    assert torch.equal(merged[-1].end, single[-1].end)


def test_buffers_move_by_neither(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    for segment in trajectory.segments():
        data = trajectory.layout.views(segment.data_update)
        assert not data["1.running_mean"].any()
        assert trajectory.layout.views(segment.update)["1.running_mean"].any()


def test_unknown_optimizers_say_so(tmp_path: Path) -> None:
    class Mine(torch.optim.SGD):
        pass

    model = TinyNet()
    trajectory = record(tmp_path / "t", model, Mine(model.parameters(), lr=0.1, weight_decay=0.1))
    assert "no rule" in trajectory.rule_note
    assert not next(iter(trajectory.segments())).regularisation.any()


def made(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer that a name of ``RULES`` stands for."""
    module, _, cls = name.rpartition(".")
    found: type[torch.optim.Optimizer] = getattr(import_module("torch.optim" if module == "torch" else module), cls)
    return found(model.parameters(), lr=0.1, **options)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_tells_decay_from_data(tmp_path: Path, name: str, decay: float) -> None:
    """Without data a step is decay alone, from the optimizer's first step on and where training began with its state filled."""
    model = TinyNet().double()
    optimizer = made(name, model, weight_decay=decay)
    for folder, scale in (("cold", 0.0), ("filling", 1.0), ("warm", 0.0)):
        with Recorder(tmp_path / folder, model, optimizer, second_moments=True):
            for _ in range(4):
                for p in model.parameters():
                    p.grad = scale * torch.randn_like(p)
                optimizer.step()
    cold, warm = Trajectory(tmp_path / "cold"), Trajectory(tmp_path / "warm")
    assert cold.rule_note == warm.rule_note == ""
    assert cold.recursion.explains_data
    assert not cold.foreign_rules
    for segment in cold.segments():
        torch.testing.assert_close(segment.data_update, torch.zeros_like(segment.update), atol=1e-12, rtol=0)
    counts, held = start_counts(warm.header["optimizer"], warm.start_states), dict(warm.recursion.buffers(warm.start_states))
    if any(entry == "step" for state in warm.start_states.values() for entry in state):
        assert counts == dict.fromkeys(dict(model.named_parameters()), 8)
    assert held.keys() <= counts.keys()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_what_it_can_without_second_moments(tmp_path: Path, name: str) -> None:
    model = TinyNet().double()
    trajectory = record(tmp_path / "t", model, made(name, model, weight_decay=0.2), 3)
    assert trajectory.recursion.explains_data == (not RULES[name].second_moments)
    assert bool(trajectory.rule_note) == (trajectory.recursion.rules == [None])


@pytest.mark.parametrize("name", RULES)
def test_every_rule_stands_in_the_docs(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernel.md").read_text()
    assert re.search(rf"^\| {re.escape(name.removeprefix('torch.'))}\b", page, re.M)
