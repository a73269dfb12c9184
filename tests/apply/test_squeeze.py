"""A squeezed model is smaller and computes what the masked one does, or says which channels could not go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import ArtifactError, StructureError, UsageError, hold_masks, load, make_plan, masked, prune, save, squeeze
from prunekit.apply import dense_state
from prunekit.plan import Plan
from prunekit.structure import find_groups
from tests.structure_models import ATTENTIVE, HANDLED, IMAGES, REFUSED, random_scores


def trained_like(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = HANDLED[name]().to(dtype)
    model(torch.randn(50, 1, 4, 4, dtype=dtype))
    return model.eval()


def random_plan(model: nn.Module, seed: int, sparsity: float) -> Plan:
    """Weights go at random, and whole rows and columns of some tensors."""
    plan = make_plan(random_scores(model, seed), model, sparsity=sparsity)
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, mask in plan.keep.items():
        mask = mask.clone()
        for axis in (0, 1):
            lost = torch.rand(mask.shape[axis], generator=generator) < 0.3
            mask.movedim(axis, 0)[lost] = False
        keep[name] = mask
    return plan.edited(keep)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(HANDLED)),
    seed=st.integers(0, 20),
    sparsity=st.sampled_from([0.1, 0.5, 0.8, 0.95]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_function_stays(name: str, seed: int, sparsity: float, dtype: torch.dtype) -> None:
    model = trained_like(name, dtype)
    plan = random_plan(model, seed, sparsity)
    small = squeeze(model, plan, IMAGES.to(dtype))
    x = torch.randn(40, 1, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    close = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(small.model(x), masked(model, plan)(x), atol=close, rtol=close)
    for parameter, tensor in small.model.named_parameters():
        expected = [len(small.kept.get(f"{parameter}@{a}", range(s))) for a, s in enumerate(plan.shapes[parameter])]
        assert list(tensor.shape) == expected
        if parameter in small.masks:
            assert small.masks[parameter].shape == tensor.shape
            assert not tensor[~small.masks[parameter]].any()
    single = all(int(keep.sum()) == 1 for keep in small.plan.keep.values())
    if not single and not name.startswith("grouped"):  # a smaller grouped convolution can become a depthwise one
        assert not squeeze(small.model, small.masks, IMAGES.to(dtype)).removed  # a fixed point


def test_what_lost_its_inputs_or_its_readers_is_gone() -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.0)
    keep = {name: mask.clone() for name, mask in plan.keep.items()}
    keep["one.weight"][2] = False  # no inputs: its constant goes into two's bias
    keep["two.weight"][:, 5] = False  # no readers
    keep["out.weight"][:, 1] = False  # no readers
    keep["one.weight"][7] = True
    keep["two.weight"][:, 7] = False
    keep["two.weight"][1, 7] = True  # read only by a neuron that nobody reads: goes in the second round
    with torch.no_grad():
        model.one.bias[2] = 0.7
    small = squeeze(model, plan.edited(keep), IMAGES)
    assert small.removed == {"one": 3, "two": 1}
    assert small.kept["one.weight@0"].tolist() == [0, 1, 3, 4, 6, 8]
    assert small.kept["two.weight@1"].tolist() == [0, 1, 3, 4, 6, 8]
    assert small.kept["out.weight@1"].tolist() == [0, 2, 3, 4, 5, 6]
    expected = model.two.bias + 0.7 * model.two.weight[:, 2]
    torch.testing.assert_close(small.model.two.bias, expected[small.kept["two.weight@0"]])
    assert not small.left


class Padded(nn.Module):
    """A constant channel before a convolution that pads with zeros: another constant at the border."""

    def __init__(self, padding_mode: str = "zeros", bias: bool = True) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3)
        self.two = nn.Conv2d(4, 3, 3, padding=1, padding_mode=padding_mode, bias=bias)
        self.out = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "constant", "removed", "left"),
    [
        (Padded, 0.5, 0, "two pads with zeros"),
        (Padded, 0.0, 1, None),
        (lambda: Padded("circular"), 0.5, 1, None),
        (lambda: Padded("circular", bias=False), 0.5, 0, "two has no bias"),
    ],
)
def test_where_it_would_not_be_exact_the_channel_stays_and_is_named(
    make: Callable[[], nn.Module], constant: float, removed: int, left: str | None
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        model.one.bias[1] = constant
    plan = make_plan(random_scores(model), model, sparsity=0.0)
    keep = {**plan.keep, "one.weight": plan.keep["one.weight"].clone()}
    keep["one.weight"][1] = False
    plan = plan.edited(keep)
    small = squeeze(model, plan, IMAGES)
    assert small.removed.get("one", 0) == removed
    assert (left is None and not small.left) or (left is not None and left in small.left["one"])
    x = torch.randn(20, 1, 4, 4)
    torch.testing.assert_close(small.model(x), masked(model, plan)(x), atol=1e-5, rtol=1e-5)


class Gated(nn.Module):
    """A channel without inputs whose constant is multiplied by data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 5), nn.Linear(16, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(x.flatten(1)) * self.two(x.flatten(1)))


def test_a_constant_that_meets_data_stays() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    plan = make_plan(random_scores(model), model, sparsity=0.0)
    keep = {**plan.keep, "one.weight": plan.keep["one.weight"].clone()}
    keep["one.weight"][3] = False
    small = squeeze(model, plan.edited(keep), IMAGES)
    assert not small.removed


@pytest.mark.parametrize("name", ATTENTIVE)
def test_a_head_that_nobody_reads_goes_with_its_queries_keys_and_values(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = ATTENTIVE[name]().eval()
    heads = find_groups("heads", model, IMAGES)
    plan = make_plan(random_scores(model), model, sparsity=0.0)
    keep = {n: mask.clone() for n, mask in plan.keep.items()}
    for head in heads:
        (reads,) = [m for m in head.members if m.endswith("@1")]
        keep[reads[:-2]][:, head.members[reads][1]] = False
    plan = plan.edited(keep)
    small = squeeze(model, plan, IMAGES)
    assert all(small.removed[head.name] == 1 for head in heads)
    x = torch.randn(20, 1, 4, 4)
    torch.testing.assert_close(small.model(x), masked(model, plan)(x), atol=1e-5, rtol=1e-5)
    save(small.model, plan, tmp_path / "a", squeezed=small)
    assert torch.equal(load(tmp_path / "a", ATTENTIVE[name])(x), small.model(x))


@pytest.mark.parametrize(("structure", "sparsity"), [("2:4", None), ("block:2x4", 0.8)])
def test_plans_of_patterns(structure: str, sparsity: float | None) -> None:
    model = trained_like("flattened")
    plan = make_plan(random_scores(model), model, sparsity=sparsity, structure=structure)
    small = squeeze(model, plan, IMAGES)
    x = torch.randn(20, 1, 4, 4)
    torch.testing.assert_close(small.model(x), masked(model, plan)(x), atol=1e-5, rtol=1e-5)
    if structure != "2:4":
        assert small.removed


def test_plans_that_take_units_out_are_refused() -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    with pytest.raises(UsageError, match="channels are cut out as they are"):
        squeeze(model, plan, IMAGES)


def test_a_layer_is_never_emptied() -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.0)
    keep = {name: torch.zeros_like(mask) for name, mask in plan.keep.items()}
    plan = plan.edited(keep)
    small = squeeze(model, plan, IMAGES)
    assert small.removed == {"one": 8, "two": 6}
    assert "cannot be empty" in small.left["one"]
    torch.testing.assert_close(small.model(IMAGES), masked(model, plan)(IMAGES))


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_channels_are_not_handled_are_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(StructureError, match=message):
        squeeze(model, make_plan(random_scores(model), model, sparsity=0.5), IMAGES)


@pytest.mark.parametrize("name", HANDLED)
def test_a_squeezed_model_comes_back_from_disk(tmp_path: Path, name: str) -> None:
    model = trained_like(name)
    plan = random_plan(model, 3, 0.6)
    small = squeeze(prune(model, plan), plan, IMAGES)
    assert small.removed or name.startswith("grouped")  # its readers may not be folded into
    manifest = save(small.model, plan, tmp_path / "a", squeezed=small)
    back = load(tmp_path / "a", HANDLED[name])
    x = torch.randn(30, 1, 4, 4)
    assert torch.equal(back(x), small.model(x))
    assert manifest.facts["squeezed"]["removed"] == small.removed
    dense = HANDLED[name]()
    dense.load_state_dict(dense_state(back, plan, manifest.kept), strict=False)
    torch.testing.assert_close(dense.eval()(x), small.model(x), atol=1e-5, rtol=1e-5)


def test_fine_tuned_with_its_smaller_masks_it_is_saved_and_a_broken_mask_is_not(tmp_path: Path) -> None:
    model = trained_like("multilayer")
    plan = random_plan(model, 3, 0.6)
    small = squeeze(model, plan, IMAGES)
    optimizer = torch.optim.SGD(small.model.parameters(), 0.1)
    with hold_masks(small.model, small.masks, optimizer):
        F.cross_entropy(small.model(torch.randn(8, 1, 4, 4)), torch.arange(8) % 4).backward()
        optimizer.step()
    save(small.model, plan, tmp_path / "a", squeezed=small)
    with torch.no_grad():
        small.model.two.weight += 1
    with pytest.raises(ArtifactError, match=r"two\.weight has weights other than 0"):
        save(small.model, plan, tmp_path / "b", squeezed=small)


def test_modes_flags_and_the_given_model_are_left_alone() -> None:
    model = trained_like("multilayer").train()
    model.two.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = squeeze(model, random_plan(model, 3, 0.6), IMAGES)
    assert small.model.training
    assert {n for n, p in small.model.named_parameters() if not p.requires_grad} == {"two.weight", "two.bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
