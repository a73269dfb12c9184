"""Data against parameters: the identity that a wrong decay share or accumulator breaks, for every optimizer and option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import PrunekitError, Recorder, Trajectory
from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, attribute, data_scores, reconstruct
from tests.conftest import TinyNet, record, tiny_data

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "weight_decay": 0.05, "momentum": 0.8}),
    "dampening": (SGD, {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.8, "dampening": 0.3}),
    "nesterov": (SGD, {"lr": 0.05, "weight_decay": 0.05, "momentum": 0.8, "nesterov": True}),
    "adam": (ADAM, {"lr": 0.02}),
    "adam, coupled decay": (ADAM, {"lr": 0.02, "weight_decay": 0.1}),
    "adam, amsgrad": (ADAM, {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": (ADAMW, {"lr": 0.02, "weight_decay": 0.3}),
    "adamw, amsgrad": (ADAMW, {"lr": 0.02, "weight_decay": 0.3, "amsgrad": True}),
}
DATA = tiny_data(24, torch.float64)


def batch(indices: Tensor) -> tuple[Tensor, Tensor]:
    return DATA[0][indices], DATA[1][indices]


def identities(trajectory: Trajectory, model: nn.Module, make: Callable[..., tuple[Tensor, Tensor]] = batch) -> None:
    """f_0 + Σ_k + reg + momentum = f_N up to quadrature; Σ_k + momentum = Σ_i ψ_i to float64's rounding."""
    x, y = tiny_data(3, torch.float64, seed=11)
    function = ModelFunction(model, trajectory.layout, trajectory.fixed)
    found = data_scores(function, trajectory, x, y, make, nodes=4)
    shares = {
        share: torch.cat(
            [
                sum(v.flatten(2).sum(2) for v in part.scores.values())
                for part in attribute(function, trajectory.segments, x, y, nodes=4, share=share)
            ]
        )
        for share in ("kernel", "regularisation")
    }
    torch.testing.assert_close(found.scores.sum(0) + found.momentum, shares["kernel"], atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(
        found.regularisation - buffers_share(function, trajectory, x, y), shares["regularisation"], atol=1e-10, rtol=1e-8
    )
    end = function(trajectory.state(-1), x, y)
    change = (end - found.start).abs().max()
    assert (found.rebuilt - end).abs().max() < 0.01 * change


def buffers_share(function: ModelFunction, trajectory: Trajectory, x: Tensor, y: Tensor) -> Tensor:
    """What running statistics did, which is among the regularisation but belongs to no parameter."""
    total = torch.zeros(3, 4, dtype=torch.float64)
    for segment in trajectory.segments():
        moved = segment.regularisation.clone()
        for entry in trajectory.layout.parameters:
            moved[entry.span] = 0
        for node in (0.125, 0.375, 0.625, 0.875):
            total += function.directional(torch.lerp(segment.start, segment.end, node), moved, x, y)[1] / 4
    return total


def train(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 10,
    *,
    clip: float | None = None,
    micro: int = 1,
    schedule: bool = False,
    augment: bool = False,
    **options: Any,
) -> Trajectory:
    """A loop with everything in it that a user's loop may have."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s)) if schedule else None
    with Recorder(folder, model, optimizer, second_moments=True, **options) as recorder:
        for step in range(steps):
            optimizer.zero_grad()
            for m in range(micro):
                indices = torch.arange(step * 7 + m * 3, step * 7 + m * 3 + 5 + (step + m) % 3) % 24  # ragged
                seed = 100 * step + m if augment else None
                x, y = augmented(indices, seed) if seed is not None else batch(indices)
                (F.cross_entropy(model(x), y) / micro).backward()
                recorder.batch(indices, seed=seed)
            if clip is not None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                recorder.gradient_scale(min(1.0, clip / (float(norm) + 1e-6)))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return Trajectory(folder)


def augmented(indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = batch(indices)
    flip = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x), y


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    cls, options = OPTIMIZERS[name]
    model = TinyNet().double()
    identities(train(tmp_path / "t", model, cls(model.parameters(), **options)), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
@pytest.mark.parametrize(
    "option", [{"clip": 0.05}, {"micro": 3}, {"schedule": True}, {"augment": True}, {"micro": 2, "clip": 0.1, "schedule": True}]
)
def test_every_option(tmp_path: Path, name: str, option: dict[str, Any]) -> None:
    torch.manual_seed(0)
    cls, options = OPTIMIZERS[name]
    model = TinyNet().double()
    trajectory = train(tmp_path / "t", model, cls(model.parameters(), **options), **option)
    identities(trajectory, model, (lambda i, seed: augmented(i, seed)) if "augment" in option else batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam, coupled decay", "adamw"])
def test_an_optimizer_that_starts_warm(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    cls, options = OPTIMIZERS[name]
    model = TinyNet().double()
    optimizer = cls(model.parameters(), **options)
    train(tmp_path / "before", model, optimizer, 4)
    trajectory = train(tmp_path / "t", model, optimizer)
    x, y = tiny_data(3, torch.float64, seed=11)
    assert data_scores(ModelFunction(model, trajectory.layout), trajectory, x, y, batch).momentum.abs().max() > 1e-3
    identities(trajectory, model)


@pytest.mark.parametrize("name", ["momentum", "dampening", "nesterov", "adam, coupled decay", "adamw, amsgrad"])
def test_parameters_without_gradient_now_and_then(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    cls, options = OPTIMIZERS[name]
    model = TinyNet().double()
    optimizer = cls(model.parameters(), **options)
    with Recorder(tmp_path / "t", model, optimizer, second_moments=True) as recorder:
        for step in range(9):
            optimizer.zero_grad()
            model.conv.requires_grad_(step % 3 != 0)  # frozen at every third step: its gradient stays None
            indices = torch.arange(step, step + 6) % 24
            x, y = batch(indices)
            F.cross_entropy(model(x), y).backward()
            model.conv.requires_grad_(True)
            recorder.batch(indices)
            optimizer.step()
    trajectory = Trajectory(tmp_path / "t")
    assert trajectory.step(0).without_gradient == {"conv.weight", "conv.bias"}
    x, y = tiny_data(3, torch.float64, seed=11)
    function = ModelFunction(model, trajectory.layout)
    found = data_scores(function, trajectory, x, y, lambda i: batch(i), nodes=4)
    # The data's products see every parameter's gradient; those that took no step must not count.
    kernel = torch.cat(
        [sum(v.flatten(2).sum(2) for v in p.scores.values()) for p in attribute(function, trajectory.segments, x, y, nodes=4)]
    )
    torch.testing.assert_close(found.scores.sum(0), kernel, atol=1e-10, rtol=1e-8)


def test_groups_frozen_and_tied_parameters(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.two.weight = self.one.weight
            self.two.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x.flatten(1))))))

    torch.manual_seed(0)
    model = Tied().double()
    optimizer = SGD(
        [
            {"params": list(model.one.parameters()), "lr": 0.05, "weight_decay": 0.1, "momentum": 0.9},
            {"params": list(model.head.parameters()), "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    trajectory = train(tmp_path / "t", model, optimizer)
    assert [e.name for e in trajectory.layout] == ["one.weight", "one.bias", "head.weight", "head.bias"]
    identities(trajectory, model)


@pytest.mark.slow
def test_dropout_is_replayed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 4)).double()
    identities(train(tmp_path / "t", model, ADAMW(model.parameters(), lr=0.02, weight_decay=0.1), micro=2), model)


@pytest.mark.slow
def test_batch_norm_shares_a_batchs_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    trajectory = train(tmp_path / "t", model, SGD(model.parameters(), lr=0.05, momentum=0.8, weight_decay=0.05))
    before = [trajectory.state(i).clone() for i in range(len(trajectory) + 1)]
    identities(trajectory, model)
    assert all(torch.equal(trajectory.state(i), state) for i, state in enumerate(before))


def test_averaged_weights_are_the_last_piece(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.05)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with Recorder(tmp_path / "t", model, optimizer) as recorder:
        for step in range(8):
            indices = torch.arange(step, step + 6) % 24
            optimizer.zero_grad()
            x, y = batch(indices)
            F.cross_entropy(model(x), y).backward()
            recorder.batch(indices)
            optimizer.step()
            average.update_parameters(model)
        recorder.average(average.module.state_dict())
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 9
    assert torch.equal(trajectory.layout.views(trajectory.state(-1))["head.weight"], average.module.head.weight.detach())
    identities(trajectory, model)


def test_skipped_steps_leave_no_trace(tmp_path: Path) -> None:
    """A GradScaler that finds Inf does not call step: nothing is recorded, and the batch noted for it is dropped."""
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Recorder(tmp_path / "t", model, optimizer) as recorder:
        for step in range(6):
            indices = torch.arange(step, step + 6) % 24
            optimizer.zero_grad()
            x, y = batch(indices)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if step == 2:
                model.head.weight.grad[0, 0] = float("inf")
            recorder.batch(indices)
            scaler.step(optimizer)
            scaler.update()
            recorder.skip()
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 5
    assert trajectory.step(2).batches == ((3, 4, 5, 6, 7, 8),)
    identities(trajectory, model)


def test_against_brute_force(tmp_path: Path) -> None:
    """Every training sample's score by running the recursion forwards with that sample's gradient alone."""
    torch.manual_seed(0)
    model = TinyNet().double()
    cls, options = OPTIMIZERS["momentum"]
    trajectory = train(tmp_path / "t", model, cls(model.parameters(), **options), 6)
    x, y = tiny_data(2, torch.float64, seed=11)
    function = ModelFunction(model, trajectory.layout)
    found = data_scores(function, trajectory, x, y, batch)
    twin = TinyNet().double()
    for k in range(24):
        buffer = torch.zeros(trajectory.layout.total, dtype=torch.float64)
        expected = torch.zeros(2, 4, dtype=torch.float64)
        for s in range(6):
            state, after = trajectory.state(s), trajectory.state(s + 1)
            with torch.no_grad():
                for entry, p in zip(trajectory.layout, twin.parameters(), strict=True):
                    p.copy_(state[entry.span].view_as(p))
            members = trajectory.step(s).batches[0]
            gradient = torch.zeros_like(buffer)
            if k in members:
                loss = F.cross_entropy(twin(DATA[0][k : k + 1]), DATA[1][k : k + 1])
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]) / len(members)
            buffer = gradient if s == 0 else 0.8 * buffer + gradient
            expected += function.directional((state + after) / 2, -0.05 * buffer, x, y)[1]
        torch.testing.assert_close(found.scores[k], expected, atol=1e-12, rtol=1e-8)


def test_one_aggregated_target_is_the_sum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet().double()
    trajectory = train(tmp_path / "t", model, ADAMW(model.parameters(), lr=0.02, weight_decay=0.1))
    x, y = tiny_data(5, torch.float64, seed=11)
    whole = data_scores(ModelFunction(model, trajectory.layout), trajectory, x, y, batch)
    found = data_scores(ModelFunction(model, trajectory.layout), trajectory, x, y, batch, aggregate=True)
    torch.testing.assert_close(found.scores[:, 0, 0], whole.scores.sum((1, 2)), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found.rebuilt, whole.rebuilt.sum().view(1, 1), atol=1e-10, rtol=1e-8)


def test_samples_that_no_step_saw_have_rows_of_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet().double()
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1))
    x, y = tiny_data(2, torch.float64, seed=11)
    function = ModelFunction(model, trajectory.layout)
    seen = data_scores(function, trajectory, x, y, batch).scores
    more = data_scores(function, trajectory, x, y, batch, count=len(seen) + 5).scores
    assert torch.equal(more[: len(seen)], seen)
    assert not more[len(seen) :].any()
    with pytest.raises(UsageError, match=f"count is 1, but training saw sample {len(seen) - 1}"):
        data_scores(function, trajectory, x, y, batch, count=1)


def test_what_cannot_be_had_says_why(tmp_path: Path) -> None:
    class Mine(SGD):
        pass

    model = TinyNet().double()
    x, y = tiny_data(2, torch.float64)

    def attempt(name: str, optimizer: torch.optim.Optimizer, message: str, **options: Any) -> None:
        with Recorder(tmp_path / name, model, optimizer, **options) as recorder:
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                if name != "batches":
                    recorder.batch([0, 1])
                optimizer.step()
        trajectory = Trajectory(tmp_path / name)
        with pytest.raises(PrunekitError, match=message):
            data_scores(ModelFunction(model, trajectory.layout), trajectory, x, y, batch)

    attempt("mine", Mine(model.parameters(), lr=0.1), "no rule for")
    attempt("moments", ADAMW(model.parameters()), "second_moments=True")
    attempt("batches", SGD(model.parameters(), lr=0.1), r"call recorder\.batch")
    attempt("every", SGD(model.parameters(), lr=0.1), "need every state", every=2)


def test_a_user_adds_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.trajectory import rules

    class Sign(torch.optim.Optimizer):
        """Plain descent with a doubled rate: something that torch does not have."""

        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(2 * group["lr"] * p.grad)

    class Rule(rules.OptimizerRule):
        def step(self, options: Any, count: int, second_moment: Tensor | None) -> rules.LinearStep:
            return rules.LinearStep(2 * options["lr"], direct=1.0)

    model = TinyNet().double()
    optimizer = Sign(model.parameters(), lr=0.05)
    monkeypatch.setitem(rules.RULES, rules.optimizer_name(optimizer), Rule)
    torch.manual_seed(0)
    identities(train(tmp_path / "t", model, optimizer), model)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(list(OPTIMIZERS)),
    width=st.integers(2, 5),
    micro=st.integers(1, 3),
    clip=st.one_of(st.none(), st.floats(0.01, 1)),
    schedule=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_nets_optimizers_and_schedules(
    tmp_path_factory: pytest.TempPathFactory, name: str, width: int, micro: int, clip: float | None, schedule: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cls, options = OPTIMIZERS[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4)).double()
    folder = tmp_path_factory.mktemp("t") / "t"
    identities(train(folder, model, cls(model.parameters(), **options), 6, clip=clip, micro=micro, schedule=schedule), model)


def test_reconstruction_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet().double()
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1, momentum=0.8))
    x, y = tiny_data(3, torch.float64, seed=11)
    function = ModelFunction(model, trajectory.layout)
    data = tiny_data(24, torch.float64)
    found = data_scores(function, trajectory, x, y, lambda i: (data[0][i], data[1][i]))
    rebuilt = reconstruct(function, trajectory.segments(), x, y, tolerance=None).rebuilt
    torch.testing.assert_close(found.rebuilt, rebuilt, atol=1e-10, rtol=1e-8)
