"""``prune_layerwise`` as a whole: an ordinary plan, the method's weights, and refusals of what makes no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import (
    ArtifactError,
    NonFiniteError,
    Plan,
    PrunekitError,
    Scores,
    UsageError,
    load,
    make_plan,
    masked,
    prune,
    prune_layerwise,
    refine,
    save,
)
from prunekit.layerwise import METHODS
from prunekit.plan.patterns import nm_mask
from tests.blocks.models import blocks, family
from tests.structure_models import random_scores


def convolutions() -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(), nn.Linear(100, 5),
    )  # fmt: skip
    return model, [(torch.randn(16, 3, 6, 6), None)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [convolutions, lambda: family("gpt2")])
def test_the_plan_is_an_ordinary_one(method: str, make: Any, tmp_path: Path) -> None:
    model, batches = make()
    model.train()
    plan, small = prune_layerwise(model, batches, method=method, sparsity=0.6, within="layer", task="unlabelled")
    assert all(module.training for module in small.modules())
    found = dict(small.named_parameters())
    for name, keep in plan.keep.items():
        assert int((~keep).sum()) == round(0.6 * keep.numel())
        assert torch.equal(found[name] != 0, keep)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == found[name].dtype
        assert name in plan.keep or torch.equal(parameter, found[name])
    assert (plan.provenance["criterion"], plan.provenance["allocation"]) == (method, "uniform")
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").digest == plan.digest
    same = all(torch.equal(tensor, found[name]) for name, tensor in prune(model, plan).named_parameters())
    assert same != METHODS[method].changes
    save(small, plan, tmp_path / "small")
    back = load(tmp_path / "small", lambda: make()[0])
    assert all(torch.equal(tensor, found[name]) for name, tensor in back.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_patterns_run_along_inputs_however_a_weight_lies(method: str) -> None:
    model, batches = family("gpt2")  # whose weights are (inputs, outputs)
    plan, _ = prune_layerwise(model, batches, method=method, structure="2:4", task="unlabelled")
    assert plan.sparsity()["prunable"] == 0.5
    for keep in plan.keep.values():
        assert torch.equal(nm_mask(keep.t().float(), 2, 4), keep.t())
    plan.check("plan")


def by_size(model: nn.Module) -> Scores:
    """Magnitudes of all that has two axes or more."""
    sizes = {name: weight.detach().abs() for name, weight in model.named_parameters() if weight.dim() > 1}
    return replace(random_scores(model), importance=sizes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("within", [None, "rows"])
def test_a_plan_says_how_much_of_each_layer_goes(method: str, within: str | None) -> None:
    model, batches = convolutions()
    divided = make_plan(by_size(model), model, sparsity=0.6)
    shares = {name: float((~mask).double().mean()) for name, mask in divided.masks().items()}
    assert max(shares.values()) - min(shares.values()) > 0.2
    plan, small = prune_layerwise(model, batches, method=method, shares=divided, within=within, task="unlabelled")
    for name, keep in plan.keep.items():
        rows = len(keep) if (within or METHODS[method].within) == "rows" else 1
        assert abs(int((~keep).sum()) - shares[name] * keep.numel()) <= rows / 2
        assert torch.equal(small.get_parameter(name) != 0, keep)
    assert plan.provenance["allocation"] == "global"
    assert plan.provenance["layerwise"]["shares"] == {"criterion": "magnitude", "plan": divided.digest}
    plan.check("plan")


def test_equal_shares_of_a_plan_are_the_sparsity() -> None:
    model, batches = family("gpt2")
    plan, small = prune_layerwise(model, batches, method="admm", sparsity=0.5, task="unlabelled")
    again, same = prune_layerwise(model, batches, method="admm", shares=plan, task="unlabelled")
    assert all(torch.equal(again.keep[name], keep) for name, keep in plan.keep.items())
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))


def test_what_a_plan_cannot_divide_is_refused() -> None:
    model, batches = family("gpt2")
    every = make_plan(by_size(model), model, sparsity=0.6)
    with pytest.raises(
        UsageError, match=r"removes .*% of transformer.wte.weight, and by layers it stays .*ignore=\['transformer.wte.weight'\]"
    ):
        prune_layerwise(model, batches, shares=every, task="unlabelled")
    fits, _ = prune_layerwise(model, batches, method="wanda", sparsity=0.5, task="unlabelled")
    with pytest.raises(UsageError, match="leave sparsity out"):
        prune_layerwise(model, batches, sparsity=0.5, shares=fits, task="unlabelled")
    pattern, _ = prune_layerwise(model, batches, method="wanda", structure="2:4", task="unlabelled")
    for structure, plan in (("2:4", fits), ("unstructured", pattern)):
        with pytest.raises(UsageError, match="the structure is 2:4"):
            prune_layerwise(model, batches, structure=structure, shares=plan, task="unlabelled")
    with pytest.raises(ArtifactError, match="made for model"):
        prune_layerwise(masked(model, fits), batches, shares=fits, task="unlabelled")


def test_transposed_convolutions_take_no_patterns() -> None:
    model, batches = convolutions()
    plan, small = prune_layerwise(model, batches, structure="2:4", task="unlabelled")
    assert "transposed" in plan.provenance["refused"]["4.weight"]
    assert torch.equal(small.get_parameter("4.weight"), model.get_parameter("4.weight"))
    plan.check("plan")


def test_outputs_stay_near_in_the_order_of_the_methods() -> None:
    model, batches = blocks(width=16)
    x = torch.cat([x for x, _ in batches])

    def distance(method: str) -> float:
        small = prune_layerwise(model, batches, method=method, sparsity=0.6, task="unlabelled")[1]
        return (small(x) - model(x)).square().mean().item()

    magnitude, sparsegpt, admm = (distance(method) for method in ("magnitude", "sparsegpt", "admm"))
    assert admm < sparsegpt < magnitude


def test_refining_begins_at_the_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(64, 6)
    batches = [(x, model(x).argmax(1))]
    plan, _ = prune_layerwise(model, batches, sparsity=0.5)
    better = refine(plan, model, batches, rounds=1, steps=5)
    assert {name: int(keep.sum()) for name, keep in better.before.keep.items()} == {n: int(k.sum()) for n, k in plan.keep.items()}
    assert sum(int(k.sum()) for k in better.keep.values()) == sum(int(k.sum()) for k in plan.keep.values())
    assert masked(model, better)(x).shape == (64, 3)


def test_a_layer_that_no_sample_reaches_goes_by_magnitude_and_is_named() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.used(x)
            return found

    torch.manual_seed(0)
    model = Router()
    plan, _ = prune_layerwise(model, [(torch.randn(8, 4), None)], method="wanda", sparsity=0.5, task="unlabelled")
    assert plan.provenance["layerwise"]["by_magnitude"] == ["idle.weight"]
    rows = model.idle.weight.detach().abs()
    assert all(row[keep].min() > row[~keep].max() for row, keep in zip(rows, plan.keep["idle.weight"], strict=True))


def test_half_precision_stays_half_precision() -> None:
    model, batches = blocks()
    model = model.to(torch.bfloat16)
    _, small = prune_layerwise(model, [(x.to(torch.bfloat16), y) for x, y in batches], sparsity=0.5, task="unlabelled")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparsgpt", "sparsity": 0.5}, "layer-wise method 'sparsgpt' does not exist; did you mean sparsegpt"),
        ({}, "needs a sparsity"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": 0.5, "structure": "channels"}, "structure 'channels': layer-wise methods remove single weights"),
        ({"sparsity": 0.5, "structure": "block:4x1"}, "layer-wise methods remove single weights"),
        ({"sparsity": 0.6, "structure": "2:4"}, "2:4 removes 0.5"),
        ({"structure": "2:4", "within": "layer"}, "within is 'layer', and 2:4 keeps as much in every row"),
        ({"sparsity": 0.5, "within": "row"}, "within is 'row'; did you mean rows"),
        ({"sparsity": 0.5, "damping": -1}, "damping is -1; it must be at least 0"),
        ({"sparsity": 0.5, "samples": 0}, "samples is 0; it must be at least 1"),
        ({"sparsity": 0.5, "ignore": ["blcks.*"]}, "'blcks.*' matches no parameter"),
        ({"sparsity": 0.5, "ignore": ["*"]}, "nothing is left to prune"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    model, batches = blocks()
    with pytest.raises(UsageError, match=message):
        prune_layerwise(model, batches, task="unlabelled", **options)


def test_inputs_that_are_not_numbers_or_say_too_little_are_refused_with_the_layer() -> None:
    model, batches = blocks()
    with pytest.raises(PrunekitError, match=r"blocks.0.inner.weight: its inputs depend on one another, and damping is 0"):
        prune_layerwise(model, [(x[:1, :1], y) for x, y in batches], sparsity=0.5, damping=0.0, task="unlabelled")
    batches[0][0][0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"blocks.0.inner.weight: its layer's inputs are NaN or Inf"):
        prune_layerwise(model, batches, sparsity=0.5, task="unlabelled")


def test_what_is_ignored_stays_whole() -> None:
    model, batches = blocks()
    plan, small = prune_layerwise(model, batches, sparsity=0.5, ignore="blocks.1.*", task="unlabelled")
    assert not any(name.startswith("blocks.1.") for name in plan.keep)
    assert torch.equal(small.get_parameter("blocks.1.inner.weight"), model.get_parameter("blocks.1.inner.weight"))
