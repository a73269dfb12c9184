"""Pruned inputs really are handed from block to block, and what is not a row of blocks goes layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import UsageError, prune_layerwise
from prunekit.batch import call
from prunekit.criteria.layer_inputs import reaching, to_rows
from tests.blocks.models import blocks, family

STACKED = ["llama", "gpt2", "opt", "bert", "t5", pytest.param("whisper", marks=pytest.mark.slow)]  # its module takes a second


def inputs_of(model: nn.Module, names: list[str], batches: Any) -> dict[str, Tensor]:
    """``Σ x²`` of every layer's inputs in a plain run of the model."""
    modules, sums = dict(model.named_modules()), {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.flatten(0, -2).square().sum(0)

    with torch.no_grad(), reaching({name: [modules[name.removesuffix(".weight")]] for name in names}, see):
        for x, _ in batches:
            call(model, x)
    return sums


def stages(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Blocks by their prefix, with their weights, in model order."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next(place for place, part in enumerate(parts) if part.isdigit())
        found.setdefault(".".join(parts[: number + 1]), []).append(name)
    yield from found.items()


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKED)
def test_every_block_is_pruned_by_what_the_pruned_blocks_before_it_send(name: str) -> None:
    model, batches = family(name)
    before = copy.deepcopy(model.state_dict())
    plan, small = prune_layerwise(model, batches, method="wanda", sparsity=0.5, task="unlabelled")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for found in (model, small) for module in found.modules())
    dense, pruned = dict(model.named_parameters()), dict(small.named_parameters())
    done: list[str] = []
    for prefix, names in stages(list(plan.keep)):
        hybrid = copy.deepcopy(model)  # as the model was when this block's turn came
        with torch.no_grad():
            for key in done:
                dict(hybrid.named_parameters())[key].copy_(pruned[key])
        modules = dict(model.named_modules())
        for key, squares in inputs_of(hybrid, names, batches).items():
            layer = modules[key.removesuffix(".weight")]
            weight, keep = (to_rows(layer, tensor)[0] for tensor in (dense[key].detach(), plan.keep[key]))
            worth = weight.abs() * squares.sqrt()
            least = worth.sort(1).values[:, round(0.5 * weight.shape[1]) - 1 : round(0.5 * weight.shape[1])]
            assert torch.equal(keep, worth > least), (prefix, key)
        done += names


def test_moments_of_later_blocks_differ_from_the_dense_models() -> None:
    model, batches = blocks()
    plans = [prune_layerwise(model, batches, method="admm", sparsity=sparsity, task="unlabelled")[1] for sparsity in (0.0, 0.8)]
    names = ["blocks.2.inner.weight"]
    dense, none, much = (inputs_of(each, names, batches)[names[0]] for each in (model, *plans))
    assert torch.allclose(dense, none, rtol=1e-6)
    assert not torch.allclose(dense, much, rtol=0.01)


def test_layers_outside_of_blocks_stay_whole_and_are_named() -> None:
    model, batches = blocks()
    plan, small = prune_layerwise(model, batches, sparsity=0.5, task="unlabelled")
    assert set(plan.keep) == {f"blocks.{n}.{which}.weight" for n in range(3) for which in ("inner", "outer")}
    assert plan.provenance["refused"].keys() == {"first.weight", "head.weight"}
    assert plan.sparsity()["prunable"] == 0.5
    assert torch.equal(small.get_parameter("head.weight"), model.get_parameter("head.weight"))


@pytest.mark.parametrize("between", [torch.relu, lambda h: h * 1.5])
def test_a_model_that_computes_between_its_blocks_goes_layer_by_layer(between: Any) -> None:
    model, batches = blocks(between=between, blocks=2)
    plan, small = prune_layerwise(model, batches, method="wanda", sparsity=0.5, task="unlabelled")
    assert {"first.weight", "head.weight"} < set(plan.keep)
    squares = inputs_of(small, ["head.weight"], batches)["head.weight"]  # all layers before it are pruned
    worth = model.get_parameter("head.weight").detach().abs() * squares.sqrt()
    for row, keep in zip(worth, plan.keep["head.weight"], strict=True):
        assert row[keep].min() >= row[~keep].max()


def test_activations_have_a_budget() -> None:
    model, batches = blocks()
    held = 30 * 5 * 8 * 8  # samples, places, width, bytes
    prune_layerwise(model, batches, method="wanda", sparsity=0.5, activations=held + 8, task="unlabelled")
    with pytest.raises(
        UsageError, match=r"activations: the inputs of blocks take about 9\.383 KiB for 30 samples, and 9\.374 KiB may"
    ):
        prune_layerwise(model, batches, method="wanda", sparsity=0.5, activations=held - 1, task="unlabelled")
    plan, _ = prune_layerwise(model, batches, method="wanda", sparsity=0.5, samples=8, activations=held - 1, task="unlabelled")
    assert plan.provenance["layerwise"]["samples"] == 8


def test_a_mask_of_padding_goes_with_its_samples() -> None:
    model, batches = family("bert")
    masks = [torch.ones_like(x["input_ids"]) for x, _ in batches]
    masks[0][:3, 3:] = 0
    padded = [({**x, "attention_mask": mask}, None) for (x, _), mask in zip(batches, masks, strict=True)]
    plan, _ = prune_layerwise(model, padded, method="wanda", sparsity=0.5, task="unlabelled")
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    squares = inputs_of(model, [name], padded)[name]
    worth = model.get_parameter(name).detach().abs() * squares.sqrt()
    assert all(row[keep].min() >= row[~keep].max() for row, keep in zip(worth, plan.keep[name], strict=True))
