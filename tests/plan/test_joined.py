"""Structures joined by ``+``: one ranking, one budget, nothing counted twice, and names that cannot be joined refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit import Plan, StructureError, UsageError, load, make_plan, masked, prune, save
from prunekit.criteria.group_scores import growth
from prunekit.plan.left import Left, nearest_to
from prunekit.recipe.prune_options import prune_section
from prunekit.structure import Group, check_structure, find_groups, takes_sizes
from tests.export.conftest import gpt2, llama, tokens
from tests.plan.test_uniform import Stacked
from tests.structure_models import IMAGES, random_scores

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, and of plans that a few units cannot meet
JOINED = ("heads+neurons", "neurons+layers", "layers+heads+neurons")


def logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits if isinstance(inputs, dict) else model(inputs)
    return found


@pytest.mark.parametrize("build", [Stacked, llama, gpt2])
@pytest.mark.parametrize("structure", JOINED)
def test_the_small_model_is_the_masked_one_and_what_is_counted_is_what_the_masks_lack(
    build: Any, structure: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    inputs = IMAGES if build is Stacked else tokens()
    scores = random_scores(model)
    layers = [k for k in scores.importance if ".1." in k]  # one block that is worth little, so that depth goes too
    scores = replace(scores, importance={k: v / 9 if k in layers else v for k, v in scores.importance.items()})
    for sparsity in (0.3, 0.6):
        plan = make_plan(scores, model, inputs, sparsity=sparsity, structure=structure)
        small = prune(model, plan, inputs)
        torch.testing.assert_close(logits(small, inputs), logits(masked(model, plan), inputs), atol=1e-5, rtol=1e-4)
        masks = plan.masks()
        gone = sum(int((~masks[name]).sum()) for name in plan.provenance["prunable"] if name in masks)
        total = sum(torch.Size(plan.shapes[name]).numel() for name in plan.provenance["prunable"])
        assert plan.sparsity()["prunable"] == 1 - (total - gone) / total
        lost = sum(int((~masks[n]).sum()) for n, _ in model.named_parameters() if n in masks)
        scalars = sum(p.numel() for n, p in model.named_parameters() if not p.dim())
        assert sum(p.numel() for p in model.parameters()) - lost == sum(p.numel() for p in small.parameters()) + scalars
        if sparsity == 0.3 or "heads" in structure:
            assert abs(plan.sparsity()["prunable"] - sparsity) < 0.08
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").digest == plan.digest
    if build is Stacked:
        save(small, plan, tmp_path / "small")
        assert torch.equal(logits(load(tmp_path / "small", Stacked), inputs), logits(small, inputs))


def test_units_compete_by_what_they_are_worth_for_a_weight() -> None:
    """All weights alike, what goes of both kinds is alike per weight: heads of 64 weights do not outlive neurons of 16."""
    torch.manual_seed(0)
    model = Stacked().eval()
    scores = random_scores(model)
    for tensor in scores.importance.values():
        tensor.uniform_(0.9, 1.1)
    assert growth(scores) == 0.5
    plan = make_plan(scores, model, IMAGES, sparsity=0.5, structure="heads+neurons")
    for tensor in [t for name, t in scores.importance.items() if "fc" in name]:
        tensor *= 1.5
    fewer = make_plan(scores, model, IMAGES, sparsity=0.25, structure="heads+neurons")
    heads, neurons = ([n for n in plan.keep if ("fc" in n) == mlp] for mlp in (False, True))
    assert any(not plan.keep[n].all() for n in heads)
    assert any(not plan.keep[n].all() for n in neurons)
    assert all(fewer.keep[n].all() for n in neurons), "heads are worth less for a weight, though more for a unit"
    assert growth(replace(scores, provenance={**scores.provenance, "group": "sum", "aggregation": "square"})) == 1
    assert growth(replace(scores, provenance={**scores.provenance, "group": "draw"})) == 0


def test_a_block_goes_where_smaller_units_can_stay_for_it_and_else_is_passed_over() -> None:
    small = Group("a", {"w@0": torch.arange(10).view(10, 1)})
    block = Group("b", {"v@0": torch.arange(6)[None]}, replace={"b": "skip"})
    order = [[(0, [unit])] for unit in range(4)]

    def gone(target: float, ranking: list[list[tuple[int, list[int]]]]) -> list[tuple[int, list[int]]]:
        left = Left([small, block], {"w": (10, 1), "v": (6, 1)}, ["w", "v"])
        return [each for step in nearest_to(target, ranking, left, {1}) for each in step]

    assert gone(7, [*order, [(1, [0])]]) == [(0, [0]), (1, [0])]
    assert gone(2, [[(1, [0])], *order]) == [(0, [0]), (0, [1])]
    assert gone(4, [[(1, [0])], *order]) == [(1, [0])], "no nearer without: 2 beyond, and 4 smaller ones would be exact"


def test_what_lies_in_a_block_that_is_gone_counts_once() -> None:
    inside = Group("a", {"w@0": torch.arange(4).view(4, 1), "v@1": torch.arange(4).view(4, 1)})
    block = Group("b", {"w@0": torch.arange(4)[None], "v@0": torch.arange(3)[None]}, replace={"b": "skip"})
    left = Left([inside, block], {"w": (4, 2), "v": (3, 4)}, ["w", "v"])
    assert (left.total, left.cost(0), left.cost(1)) == (20, 5, 20)
    assert [left.remove(0, 2), left.remove(1, 1), left.remove(0, 1), left.remove(1, -1)] == [10, 10, 0, -5]


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ("heads+neuron", "'neuron' cannot be joined; did you mean neurons"),
        ("heads+heads", "names heads twice"),
        ("unstructured+heads", "unstructured masks single weights .* prune heads first, then unstructured"),
        ("heads+2:4", "2:4 masks single weights"),
        ("channels+neurons", "channels hold neurons already; leave neurons out"),
        ("experts+channels", "channels hold experts already"),
        ("heads+", "'' cannot be joined"),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name(structure: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_structure(structure)
    with pytest.raises(UsageError, match=f"structure '{structure.replace('+', chr(92) + '+')}'"):
        find_groups(structure, Stacked(), IMAGES)


def test_a_part_that_the_model_has_not_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(StructureError, match=r"neurons\+heads: no attention was found .*; leave heads out"):
        find_groups("neurons+heads", model, IMAGES)


def twins(model: nn.Module, example: Any) -> list[Group]:
    """The neurons of the first block, once more."""
    return [group for group in find_groups("neurons", model, example) if "0" in group.name]


def test_two_parts_that_hold_the_same_are_refused_by_name() -> None:
    with pytest.raises(StructureError, match=r"neurons and tests\.plan\.test_joined:twins both hold blocks\.0\.fc1"):
        find_groups("neurons+tests.plan.test_joined:twins", Stacked(), IMAGES)


@pytest.mark.parametrize(("criterion", "structure"), [("layers", "neurons+layers"), ("experts", "heads+experts")])
def test_scores_of_one_structures_units_are_refused_for_others(criterion: str, structure: str) -> None:
    model = Stacked()
    scores = random_scores(model)
    scores = replace(scores, provenance={**scores.provenance, "structure": criterion})
    with pytest.raises(UsageError, match=f"are of {criterion}, and the structure is"):
        make_plan(scores, model, IMAGES, sparsity=0.3, structure="heads+neurons")
    assert scores.unsuited(structure) is not None


@pytest.mark.parametrize("criterion", ["flap", "lamp"])
def test_what_says_nothing_of_blocks_does_not_rank_them(criterion: str) -> None:
    x = torch.randn(12, 1, 4, 4)
    model = Stacked().eval()
    batches = [(x, torch.zeros(12, dtype=torch.long))]
    scores = prunekit.score(prunekit.Trajectory.of(model), model, batches, criterion=criterion)
    for structure in ("layers", "neurons+layers"):
        with pytest.raises(UsageError, match=f"{criterion} says nothing of layers, and the structure is "):
            make_plan(scores, model, IMAGES, sparsity=0.3, structure=structure)
    assert make_plan(scores, model, IMAGES, sparsity=0.3, structure="heads+neurons").sparsity()["prunable"] > 0.2


def test_every_block_keeps_as_many_of_each_kind_and_a_config_says_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    inputs = tokens()
    for structure, sparsity in (("heads+neurons", 0.3), ("neurons+layers", 0.4)):
        scores = prunekit.score(prunekit.Trajectory.of(model), model, criterion="magnitude", ignore=("*embed*",))
        plan = make_plan(scores, model, inputs, sparsity=sparsity, structure=structure, uniform=True)
        left = plan.units_left()
        for part in ("self_attn", "up_proj"):
            assert len({kept for name, kept in left.items() if part in name and kept}) <= 1
        small = prune(model, plan, inputs)
        record = prunekit.export(small, "hf", tmp_path / structure, inputs, plan=plan)
        assert record.loads_with == "transformers.LlamaForCausalLM.from_pretrained"
        back = type(model).from_pretrained(tmp_path / structure)
        torch.testing.assert_close(logits(back, inputs), logits(small, inputs), atol=1e-5, rtol=1e-4)
        assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in small.parameters())
    assert len(back.model.layers) < 3
    assert back.config.intermediate_size < 24


def test_a_pruned_model_of_joined_structures_has_a_name_unasked() -> None:
    section = prune_section({"structure": "heads+neurons", "sparsity": 0.3, "criterion": "magnitude"})
    assert section.name == "heads-neurons-0.3"


def test_sizes_are_asked_of_the_parts_that_have_them() -> None:
    assert takes_sizes("neurons+layers")
    model = Stacked().eval()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="neurons+layers", round_to=8)
    assert {int(keep.sum()) % 8 for name, keep in plan.keep.items() if "fc1" in name} == {0}
