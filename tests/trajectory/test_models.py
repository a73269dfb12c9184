"""Models as people have them: wrapped, copied with difficulty, of any type, with computed and shared weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as nn_utils
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from prunekit import Recorder, StructureError, Trajectory, UsageError, make_plan, score
from prunekit.criteria import model_digest, state_digest
from prunekit.trajectory import Layout
from prunekit.trajectory.bare import bare, bare_optimizer
from prunekit.trajectory.copies import copied
from prunekit.trajectory.derived import derived_weights, unmaskable
from prunekit.trajectory.layout import named_tensors
from prunekit.trajectory.ties import overlaps


def net(wrap: Callable[[nn.Linear], nn.Module] = lambda layer: layer) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(6, 16)), nn.Tanh(), nn.Linear(16, 3))


class Wrapped:
    """An optimizer in a wrapper that is none itself, as accelerate and Lightning have it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.param_groups = optimizer.param_groups

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._optimizer.step()


def recorded(folder: Path, model: nn.Module, optimizer: Any, x: Tensor) -> Trajectory:
    with Recorder(folder, model, optimizer, second_moments=True) as recorder:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x).float(), torch.arange(len(x)) % 3).backward()
            recorder.batch(range(len(x)))
            optimizer.step()
    return Trajectory(folder)


@pytest.mark.slow
def test_wrapped_models_and_optimizers_leave_the_same_recording(tmp_path: Path) -> None:
    x, found = torch.randn(8, 6), {}
    for name, wrap in {
        "plain": lambda m: m,
        "compiled": lambda m: torch.compile(m, backend="eager"),
        "parallel": nn.DataParallel,
        "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    }.items():
        model = wrap(net())
        optimizer: Any = torch.optim.AdamW(model.parameters(), 0.05)
        torch.optim.lr_scheduler.StepLR(optimizer, 2)  # puts another step method on the optimizer
        found[name] = recorded(tmp_path / name, model, optimizer if name == "plain" else Wrapped(Wrapped(optimizer)), x)
        assert model_digest(model) == state_digest(found[name].state(-1))
        assert score(found[name], model, criterion="magnitude").provenance["model"] == model_digest(model)
    assert {t.hash for t in found.values()} == {found["plain"].hash}
    assert all(t.layout == found["plain"].layout for t in found.values())


def test_what_is_no_optimizer_or_model_is_refused() -> None:
    with pytest.raises(UsageError, match="a Linear and holds no"):
        bare_optimizer(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, not int"):
        bare(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "mixed"])
def test_models_of_any_floating_type_are_recorded_and_scored(tmp_path: Path, dtype: Any) -> None:
    model = net().to(torch.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        model[0] = nn.Linear(6, 16)
        nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
        model.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))
    x = torch.randn(8, 6, dtype=next(model.parameters()).dtype)
    trajectory = recorded(tmp_path / "t", model, torch.optim.SGD(model.parameters(), 0.1), x)
    for name, tensor in named_tensors(model).items():
        assert torch.equal(trajectory.model_state()[name].to(tensor.dtype), tensor)
    wide = net().to(torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != "mixed":
        wide.load_state_dict(trajectory.model_state())
        y = torch.arange(8) % 3
        F.cross_entropy(wide(x.to(wide[0].weight)), y).backward()
        expected = (wide[0].weight * wide[0].weight.grad).abs()
        found = score(trajectory, model, [(x, y)], criterion="taylor", device="cpu").importance["0.weight"]
        assert found.dtype == wide[0].weight.dtype
        assert found.shape == expected.shape
    assert model_digest(model) == state_digest(trajectory.state(-1))


@pytest.mark.parametrize(
    ("wrap", "maskable"),
    [
        (weight_norm, {"0.parametrizations.weight.original1"}),
        (spectral_norm, {"0.parametrizations.weight.original"}),
        (orthogonal, set()),
        (nn_utils.weight_norm, {"0.weight_v"}),
        (nn_utils.spectral_norm, {"0.weight_orig"}),
        (lambda m: torch_prune.random_unstructured(m, "weight", 0.3), {"0.weight_orig"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_computed_weights_are_what_the_layer_uses_and_are_known_by_what_a_mask_does(
    tmp_path: Path, wrap: Callable[[nn.Linear], nn.Module], maskable: set[str]
) -> None:
    model = net(wrap)
    trajectory = recorded(tmp_path / "t", model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(8, 6))
    model.eval()(torch.randn(2, 6))
    before = model_digest(model)
    (one,) = derived_weights(model)
    assert one.name == "0.weight"
    torch.testing.assert_close(one.value(), model[0].weight.detach())
    assert set(one.parts) - set(unmaskable(model, one.parts)) == maskable
    assert model_digest(model) == before == state_digest(trajectory.state(-1))
    twin = copied(model)
    x = torch.randn(5, 6)
    assert torch.equal(twin.eval()(x), model(x))
    with torch.no_grad():
        twin[2].weight.zero_()
    assert model[2].weight.any()


def test_a_weight_that_cannot_be_masked_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    model = net(orthogonal)
    trajectory = recorded(tmp_path / "t", model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(8, 6))
    with pytest.raises(StructureError, match=r"0\.parametrizations\.weight\.original cannot be pruned.*remove_parametrizations"):
        score(trajectory, model, criterion="magnitude")
    assert score(trajectory, model, criterion="magnitude", ignore=["0.*"]).provenance["prunable"] == ["2.weight"]


def test_masks_of_torch_are_where_a_plan_begins(tmp_path: Path) -> None:
    """Masked weights count as 0 in every state, so they go first, by whatever criterion."""
    model = net(lambda layer: torch_prune.random_unstructured(layer, "weight", 0.25))
    gone = model[0].weight_mask == 0
    x = torch.randn(8, 6)
    trajectory = recorded(tmp_path / "t", model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1, momentum=0.9), x)
    for criterion in ("magnitude", "influence", "taylor"):
        scores = score(trajectory, model, [(x, torch.arange(8) % 3)], criterion=criterion)
        assert not scores.importance["0.weight_orig"][gone].any()
        plan = make_plan(scores, model, sparsity=0.4)
        assert not plan.masks()["0.weight_orig"][gone].any()


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_refused_by_the_module() -> None:
    with pytest.raises(StructureError, match=r"cannot be copied.*: 0\.1 \(Locked\) holds"):
        copied(nn.Sequential(nn.Sequential(nn.ReLU(), Locked())))


def test_a_forward_that_was_wrapped_is_the_copys_own() -> None:
    model, x = net(), torch.randn(3, 6)
    own = model[0].forward

    @functools.wraps(own)
    def forward(*arguments: Tensor) -> Tensor:
        return own(*arguments).float()

    model[0].forward = forward
    expected = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert not twin[0](x).any()
    assert torch.equal(model(x), expected)
    del forward.__wrapped__
    with pytest.raises(StructureError, match=r"0 \(Linear\) has a forward put in its place"):
        copied(model)


def test_shared_memory_is_found_in_every_form() -> None:
    table = torch.arange(24.0).view(4, 6)
    named = {
        "whole": table, "again": table.view(4, 6), "turned": table.t(), "rows": table[:2], "left": table[:, :3],
        "right": table[:, 3:], "other": torch.zeros(4, 6), "bytes": table.view(torch.uint8)[3], "spread": table[0, :1].expand(5),
    }  # fmt: skip
    found = {(a, b): how for a, b, how in overlaps(named)}
    assert found["whole", "again"] == "the same view"
    assert found["whole", "turned"] == "transposed"
    assert {found["whole", name] for name in ("rows", "left", "right", "bytes", "spread")} == {"overlapping"}
    assert ("left", "right") not in found
    assert ("rows", "bytes") not in found
    assert not any("other" in pair for pair in found)


@pytest.mark.parametrize(
    ("share", "how"),
    [
        (lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.detach())), "the same view"),
        (lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.detach().t())), "transposed"),
        (lambda m: setattr(m[1], "bias", nn.Parameter(m[0].weight.detach()[1])), "overlapping"),
        (lambda m: m.register_buffer("view", m[0].weight.detach()[1:]), "overlapping"),
    ],
)
def test_parameters_on_one_memory_are_refused_by_name(tmp_path: Path, share: Callable[[nn.Module], Any], how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    share(model)
    with pytest.raises(StructureError, match=rf"shares memory with 0\.weight \({how}\)"):
        Recorder(tmp_path / "t", model, torch.optim.SGD(model.parameters(), 0.1))
    assert Layout.of(copied(model)).total >= 40  # a copy shares nothing
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert Layout.of(model).parameters == ()


def test_parameters_without_real_numbers_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"0\.weight has no shape yet"):
        Layout.of(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UsageError, match=r"weight is torch\.complex64"):
        Layout.of(nn.Linear(2, 2, dtype=torch.complex64))
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="weight is on the meta device"):
        Layout.of(nn.Linear(2, 2)).check(model)


class Odd(nn.Module):
    """Buffers of every type, statistics switched off, something that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)
        for name, value in {
            "count": torch.zeros((), dtype=torch.int64), "flags": torch.ones(2, dtype=torch.bool), "nothing": None,
            "phase": torch.ones(2, dtype=torch.complex64), "wave": torch.ones(2), "small": torch.ones(2, dtype=torch.bfloat16),
        }.items():  # fmt: skip
            self.register_buffer(name, value, persistent=name != "wave")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.small = self.small * 0.5  # another tensor in the buffer's place
            self.phase = self.phase * 1j
        return self.norm(self.layer(x)) * self.small.sum()


def test_buffers_of_any_type_have_their_place(tmp_path: Path) -> None:
    model, x = Odd(), torch.randn(8, 6)
    trajectory = recorded(tmp_path / "t", model, torch.optim.SGD(model.parameters(), 0.1), x)
    state = trajectory.model_state()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    with pytest.raises(UsageError, match=r"norm \(BatchNorm1d\) keeps no running statistics"):
        score(trajectory, model, [(x, torch.arange(8) % 3)], criterion="influence")
    scores = score(trajectory, model, criterion="movement")
    assert make_plan(scores, model, sparsity=0.5).sparsity()["prunable"] == 0.5
