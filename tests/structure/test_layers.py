"""Whole residual blocks: those that are the identity without their weights, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prunekit import Plan, StructureError, load, make_plan, masked, prune, save
from prunekit.models import digits_transformer
from prunekit.structure import find_groups
from prunekit.structure.replacements import Skip
from tests.structure_models import IMAGES, Encoder, PreNormStack, Stack, random_scores


def test_blocks_that_can_go_and_those_that_cannot() -> None:
    groups = find_groups("layers", Stack(), IMAGES)
    assert [g.name for g in groups] == ["blocks.0", "blocks.1", "blocks.2"]
    assert groups.refused.keys() == {"tail.0"}
    assert "no residual block" in groups.refused["tail.0"]
    assert {m for m in groups[0].members if "running" in m} == {
        f"blocks.0.{norm}.{key}@0" for norm in ("norm1", "norm2") for key in ("running_mean", "running_var")
    }


def test_digits_transformer_layers_can_go() -> None:
    assert {g.name for g in find_groups("layers", digits_transformer(), torch.randn(2, 1, 8, 8))} == {"layers.0", "layers.1"}


def test_the_least_important_block_goes_and_all_may(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = PreNormStack().eval()
    scores = random_scores(model)
    for name, tensor in scores.importance.items():
        tensor.fill_({"encoder.0": 2.0, "encoder.1": 1.0, "encoder.2": 3.0}.get(name.rpartition(".")[0].rpartition(".")[0], 9.0))
    x = torch.randn(7, 1, 4, 4)
    for allocation in ("global", "uniform"):
        plan = make_plan(scores, model, IMAGES, sparsity=0.3, structure="layers", allocation=allocation)
        assert plan.skipped() == ["encoder.1"]
        small = prune(model, plan, IMAGES)
        assert isinstance(small.encoder[1], Skip)  # type: ignore[index]
        assert torch.allclose(small(x), model.out(model.encoder[2](model.encoder[0](x.flatten(1)))))
    plan = make_plan(scores, model, IMAGES, sparsity=0.99, structure="layers")
    assert plan.skipped() == ["encoder.0", "encoder.1", "encoder.2"]
    save(prune(model, plan, IMAGES), plan, f"{tmp_path}/a")
    assert torch.allclose(load(f"{tmp_path}/a", PreNormStack)(x), model.out(x.flatten(1)))
    assert torch.allclose(masked(model, plan)(x), model.out(x.flatten(1)))


def test_torchs_encoder_may_lose_its_first_layer(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = Encoder(norm_first=True).eval()
    assert [g.name for g in find_groups("layers", model, IMAGES)] == ["encoder.layers.0", "encoder.layers.1"]
    scores = random_scores(model)
    for name, tensor in scores.importance.items():
        tensor.fill_(1.0 + name.startswith("encoder.layers.1"))
    plan = make_plan(scores, model, IMAGES, sparsity=0.4, structure="layers")
    assert plan.skipped() == ["encoder.layers.0"]
    small = prune(model, plan, IMAGES)
    x = torch.randn(5, 1, 4, 4)
    expected = model.head(model.encoder.layers[1](model.embed(x.squeeze(1))).mean(1))
    torch.testing.assert_close(small(x), expected)
    save(small, plan, f"{tmp_path}/a")
    with torch.no_grad():
        torch.testing.assert_close(load(f"{tmp_path}/a", lambda: Encoder(norm_first=True))(x), expected)


def test_a_block_that_normalises_its_output_goes_and_its_input_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder(norm_first=False).eval()
    groups = find_groups("layers", model, IMAGES)
    assert [(g.name, g.masked) for g in groups] == [(f"encoder.layers.{n}", {f"encoder.layers.{n}": "skip"}) for n in (0, 1)]
    scores = random_scores(model)
    for name, tensor in scores.importance.items():
        tensor.fill_(1.0 + name.startswith("encoder.layers.1"))
    plan = make_plan(scores, model, IMAGES, sparsity=0.4, structure="layers")
    x = torch.randn(5, 1, 4, 4)
    expected = model.head(model.encoder.layers[1](model.embed(x.squeeze(1))).mean(1))
    small = prune(model, plan, IMAGES)
    save(small, plan, tmp_path / "a")
    for each in (small, masked(model, plan), load(tmp_path / "a", lambda: Encoder(norm_first=False))):
        with torch.no_grad():
            torch.testing.assert_close(each(x), expected)
    assert Plan.load(tmp_path / "a" / "plan.safetensors").stand_ins().keys() == {"encoder.layers.0"}


def test_a_plain_stack_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(StructureError, match=r"layers: nothing can be removed: 1: .*no residual block; 3: it turns"):
        find_groups("layers", model, IMAGES)


def test_a_model_without_a_stack() -> None:
    with pytest.raises(StructureError, match="no stack of blocks"):
        find_groups("layers", nn.Linear(4, 4), IMAGES)
