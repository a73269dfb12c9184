"""What is saved is what was pruned, whatever its types, ties, wrappers and computed weights; or it is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as nn_utils
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from prunekit import (
    ArtifactError,
    NonFiniteError,
    Plan,
    PrunekitError,
    StructureError,
    UsageError,
    hold_masks,
    load,
    make_plan,
    masked,
    prune,
    save,
)  # fmt: skip
from prunekit.apply import apply_masks
from prunekit.criteria import Scores
from prunekit.structure.prunable import prunable_parameters
from prunekit.trajectory import Layout
from tests.apply.test_apply import random_scores


def net(wrap: Callable[[nn.Linear], nn.Module] = lambda layer: layer) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(6, 16)), nn.Tanh(), nn.Linear(16, 3))


def plan_of(model: nn.Module, sparsity: float = 0.5, **options: Any) -> Plan:
    scores = random_scores(model)
    wanted = prunable_parameters(model, Layout.of(model))
    importance = {name: scores.importance[name] for name in wanted}
    scores = Scores(importance, {}, {**scores.provenance, "prunable": wanted}, {}, {})
    return make_plan(scores, model, sparsity=sparsity, **options)


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    x = torch.randn(12, 6)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), torch.arange(12) % 3).backward()
        optimizer.step()


def half(build: Callable[[], nn.Module], dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: build().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "channels"])
def test_models_of_any_type_are_pruned_and_come_back_in_it(tmp_path: Path, dtype: torch.dtype, structure: str) -> None:
    build = half(net, dtype)
    model, x = build(), torch.randn(5, 6, dtype=dtype)
    plan = make_plan(random_scores(model), model, x[:2], sparsity=None if structure == "2:4" else 0.5, structure=structure)
    small = prune(model, plan, x[:2]).eval()
    assert {p.dtype for p in small.parameters()} == {dtype}
    save(small, plan, tmp_path / "a")
    back = load(tmp_path / "a", build)
    assert torch.equal(back(x), small(x))
    assert {p.dtype for p in back.parameters()} == {dtype}


def test_weights_of_eight_bits_are_masked() -> None:
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    model = nn.Module()
    model.weight = nn.Parameter(weight.clone(), requires_grad=False)
    mask = torch.arange(16).view(4, 4) % 3 == 0
    apply_masks(model, {"weight": mask})
    assert torch.equal(model.weight.float(), weight.float() * mask)


def test_a_meta_factory_and_a_wrapped_one_load_the_same(tmp_path: Path) -> None:
    def meta() -> nn.Module:
        with torch.device("meta"):
            return net()

    model, x = net(), torch.randn(5, 6)
    plan = make_plan(random_scores(model), model, x[:2], sparsity=0.5, structure="channels")
    small = prune(torch.compile(model, backend="eager"), plan, x[:2])
    assert type(small) is nn.Sequential
    save(nn.DataParallel(small), plan, tmp_path / "a")
    for build in (net, meta, lambda: nn.DataParallel(net())):
        assert torch.equal(load(tmp_path / "a", build)(x), small(x))


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def test_tied_weights_stay_tied_and_load_into_untied_ones_exactly(tmp_path: Path) -> None:
    model, x = Tied(), torch.randint(9, (4, 5))
    plan = plan_of(model)
    small = prune(model, plan)
    assert small.head.weight is small.embed.weight
    save(small, plan, tmp_path / "a")
    back = load(tmp_path / "a", Tied)
    assert back.head.weight is back.embed.weight
    assert torch.equal(back(x), small(x))
    assert torch.equal(load(tmp_path / "a", lambda: Tied(False))(x), small(x))
    assert float((back.embed.weight == 0).float().mean()) == plan.sparsity()["prunable"]


def test_an_untied_model_does_not_load_into_a_tied_one(tmp_path: Path) -> None:
    model = Tied(False)
    plan = plan_of(model)
    save(prune(model, plan), plan, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"embed\.weight and head\.weight are tied in the model and differ"):
        load(tmp_path / "a", Tied)


def test_parameters_that_share_memory_are_not_saved(tmp_path: Path) -> None:
    model = Tied(False)
    plan = plan_of(model)
    small = prune(model, plan)
    small.head.weight = nn.Parameter(small.embed.weight.detach())
    with pytest.raises(PrunekitError, match=r"head\.weight"):
        save(small, plan, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wrap", [weight_norm, nn_utils.weight_norm, spectral_norm, nn_utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_computed_weights_are_masked_where_they_are_used(tmp_path: Path, wrap: Callable[[nn.Linear], nn.Module]) -> None:
    def build() -> nn.Module:
        return net(wrap)

    model, x = build(), torch.randn(5, 6)
    model(x)  # the older hooks leave a computed weight on the layer, which torch cannot copy
    plan = plan_of(model, 0.4)
    small = prune(model, plan).eval()
    name = next(name for name in plan.masks() if name.startswith("0."))
    assert not small[0].weight[~plan.masks()[name]].any()
    assert small[0].weight.any()
    save(small, plan, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", build)(x), small(x))
    optimizer = torch.optim.SGD(small.train().parameters(), 0.1, momentum=0.9)
    with hold_masks(small, plan, optimizer):
        train(small, optimizer)
    small.eval()(x)
    assert not small[0].weight[~plan.masks()[name]].any()
    save(small, plan, tmp_path / "b")
    assert torch.equal(load(tmp_path / "b", build)(x), small(x))


@pytest.mark.parametrize("wrap", [weight_norm, nn_utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_normalised_row_without_weights_is_refused_by_name(tmp_path: Path, wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = net(wrap)
    plan = plan_of(model, 0.4)
    name = next(name for name in plan.masks() if name.startswith("0."))
    gone = torch.ones(16, 6, dtype=torch.bool)
    gone[3] = False
    with pytest.raises(StructureError, match=r"0\..*row 3 of it keeps too little: .*gives NaN"):
        apply_masks(copy_of(model), {name: gone})
    with torch.no_grad():
        bad = prune(model, plan)
        bad.get_parameter(name)[3] = 0
    with pytest.raises(NonFiniteError, match=r"0\.weight, which .* computes, holds NaN"):
        save(bad, plan, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def copy_of(model: nn.Module) -> nn.Module:
    twin = net(weight_norm if hasattr(model[0], "parametrizations") else nn_utils.weight_norm)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    model = net()
    plan = plan_of(model)
    small = prune(model, plan)
    with torch.no_grad():
        small[2].bias[0] = value
    with pytest.raises(NonFiniteError, match=r"2\.bias holds NaN or Inf"):
        save(small, plan, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_masks_of_torch_come_along_and_load_into_a_plain_model(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return net(lambda layer: torch_prune.random_unstructured(layer, "weight", 0.25))

    model, x = build(), torch.randn(5, 6)
    gone = model[0].weight_mask == 0
    plan = plan_of(model)
    small = prune(model, plan)
    assert not small[0].weight[gone].any()
    assert not small[0].weight[~plan.masks()["0.weight_orig"]].any()
    save(small, plan, tmp_path / "a")
    for factory in (build, net):
        assert torch.equal(load(tmp_path / "a", factory)(x), small(x))


def test_a_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": 3}

        def set_extra_state(self, state: Any) -> None:
            return None

    model = nn.Sequential(Extra(4, 4))
    plan = plan_of(model)
    with pytest.raises(ArtifactError, match=r"0\._extra_state is a dict"):
        save(prune(model, plan), plan, tmp_path / "a")


@pytest.mark.parametrize("kind", ["dense", "copy", "some", "moved"])
def test_masks_are_not_held_with_another_models_optimizer(kind: str) -> None:
    model = net()
    plan = plan_of(model)
    small = prune(model, plan)
    optimizer = {
        "dense": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "copy": lambda: torch.optim.SGD(copy.deepcopy(small).parameters(), 0.1),
        "some": lambda: torch.optim.SGD([*small[0].parameters(), *model[2].parameters()], 0.1),
        "moved": lambda: torch.optim.SGD(masked(small, plan).parameters(), 0.1),
    }[kind]()
    with (
        pytest.raises(UsageError, match=r"the optimizer holds \d of \d parameters that are not the model's"),
        hold_masks(small, plan, optimizer),
    ):
        pass


def test_masks_are_held_through_wrappers_and_several_optimizers() -> None:
    model = net()
    plan = plan_of(model)
    small = prune(model, plan)
    wrapped = nn.DataParallel(torch.compile(small, backend="eager"))
    pair = [torch.optim.AdamW(small[0].parameters(), 0.1), torch.optim.SGD(small[2].parameters(), 0.1)]
    before = small[2].bias.detach().clone()
    with hold_masks(wrapped, plan, pair):
        for one in pair:
            train(wrapped, one)
    assert not torch.equal(small[2].bias, before)
    for name, mask in plan.masks().items():
        assert not small.get_parameter(name)[~mask].any()
