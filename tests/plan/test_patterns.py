"""N:M and blocks: exactly the pattern, the most important kept, and names that mean nothing refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import ArtifactError, Plan, UsageError, make_plan, masked
from prunekit.plan import ALLOCATIONS, choices
from prunekit.plan.allocation import Request
from prunekit.plan.patterns import block_masks, nm_mask, pattern_fault, tile_importance
from prunekit.recipe import Recipe
from prunekit.structure import Pattern, check_structure
from tests.structure_models import HANDLED, IMAGES, random_scores

SHAPES = st.sampled_from([(3, 8), (5, 13), (4, 3, 3, 3), (1, 1), (2, 7, 1), (6, 2, 5)])


def levels_of(shape: tuple[int, ...], levels: int, seed: int) -> torch.Tensor:
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=80, deadline=None)
@given(shape=SHAPES, of=st.integers(2, 9), data=st.data(), levels=st.integers(1, 9))
def test_of_every_m_consecutive_weights_the_n_largest_stay(
    shape: tuple[int, ...], of: int, data: st.DataObject, levels: int
) -> None:
    stay = data.draw(st.integers(1, of - 1))
    importance = levels_of(shape, levels, of)
    mask = nm_mask(importance, stay, of)
    assert mask.shape == importance.shape
    for row, kept in zip(importance.flatten(1).tolist(), mask.flatten(1).tolist(), strict=True):
        for begin in range(0, len(row), of):
            run, chosen = row[begin : begin + of], kept[begin : begin + of]
            count = -(-len(run) * stay // of)  # N of a whole run, the share of a shorter one rounded up
            assert sum(chosen) == count
            best = sorted(run, reverse=True)[:count]
            assert sorted((v for v, k in zip(run, chosen, strict=True) if k), reverse=True) == best
    assert pattern_fault(mask, Pattern("nm", stay, of)) is None


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    sparsity=st.floats(0, 0.99),
    levels=st.integers(1, 9),
    allocation=st.sampled_from(list(ALLOCATIONS)),
    group=st.sampled_from(["sum", "l2", "draw"]),
)
def test_blocks_go_whole_and_to_the_nearest_share(
    shapes: list[tuple[int, ...]], rows: int, columns: int, sparsity: float, levels: int, allocation: str, group: str
) -> None:
    importance = {str(n): levels_of(shape, levels, n) for n, shape in enumerate(shapes)}
    pattern = Pattern("block", rows, columns)
    sharing = partial(ALLOCATIONS[allocation], request=Request(sparsity))
    masks = block_masks(importance, pattern, sparsity, sharing, group)  # type: ignore[arg-type]
    largest = 0
    for name, mask in masks.items():
        flat = mask.flatten(1)
        for r in range(0, flat.shape[0], rows):
            for c in range(0, flat.shape[1], columns):
                tile = flat[r : r + rows, c : c + columns]
                assert tile.all() or not tile.any()
                largest = max(largest, tile.numel())
        assert mask.shape == importance[name].shape
        assert pattern_fault(mask, pattern) is None
    total = sum(m.numel() for m in masks.values())
    assert abs(sum(int((~m).sum()) for m in masks.values()) - sparsity * total) <= largest / 2 + 1e-6


def test_blocks_of_one_weight_are_unstructured() -> None:
    importance = {"a": torch.rand(4, 6), "b": torch.rand(3, 2, 2)}
    masks = block_masks(importance, Pattern("block", 1, 1), 0.5, partial(ALLOCATIONS["global"], request=Request(0.5)))
    flat = torch.cat([v.flatten() for v in importance.values()])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert int(kept.sum()) == 18
    assert flat[kept].min() >= flat[~kept].max()


def test_importance_of_a_tile() -> None:
    importance = torch.arange(12.0).view(3, 4)
    assert tile_importance(importance, 2, 3).tolist() == [[0 + 1 + 2 + 4 + 5 + 6, 3 + 7], [8 + 9 + 10, 11]]
    norm = (0 + 1 + 4 + 16 + 25 + 36) ** 0.5
    assert float(tile_importance(importance, 2, 3, "l2")[0, 0]) == pytest.approx(norm)
    assert tile_importance(importance, 2, 3, "draw").tolist() == [[0, 3], [8, 11]]


@pytest.mark.parametrize("structure", ["2:4", "1:4", "4:8", "block:4x1", "block:2x3"])
def test_plans_of_patterns_are_dense_masks_that_come_back(tmp_path: Path, structure: str) -> None:
    model = HANDLED["flattened"]()
    plan = make_plan(random_scores(model), model, sparsity=0.5 if structure.startswith("block") else None, structure=structure)
    assert not plan.smaller
    assert plan.masking
    pruned = masked(model, plan)
    for name, mask in plan.masks().items():
        assert not pruned.get_parameter(name)[~mask].any()
        assert torch.equal(pruned.get_parameter(name)[mask], model.get_parameter(name)[mask])
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").digest == plan.digest
    expected = {"1:4": 0.75}.get(structure, 0.5)
    assert plan.provenance["sparsity"] == expected
    assert plan.sparsity()["prunable"] == pytest.approx(expected, abs=0.02)
    name = next(iter(plan.keep))
    broken = torch.ones_like(plan.keep[name])
    broken.view(-1)[0] = structure[0] != "b"
    with pytest.raises(ArtifactError, match=f"{name} keeps .*its structure is {structure}"):
        plan.edited({name: broken})


@pytest.mark.parametrize(
    ("structure", "sparsity", "message"),
    [
        ("4:2", 0.5, "1 <= N < M"),
        ("0:4", None, "1 <= N < M"),
        ("block:0x1", 0.5, "from 1 to"),
        ("block:4", 0.5, "does not exist"),
        ("2:4", 0.7, "sparsity is 0.7; 2:4 removes 0.5"),
        ("block:4x1", None, "needs a sparsity"),
        ("unstructured", None, "needs a sparsity"),
        ("heads", 1.0, "sparsity is 1.0"),
        ("heads", 0.5, "needs example_inputs"),
    ],
)
def test_what_means_nothing_is_refused(structure: str, sparsity: float | None, message: str) -> None:
    model = HANDLED["multilayer"]()
    with pytest.raises(UsageError, match=message):
        make_plan(random_scores(model), model, sparsity=sparsity, structure=structure)


def test_names_and_grids() -> None:
    for name in ("unstructured", "channels", "heads", "layers", "2:4", "7:16", "block:16x16"):
        check_structure(name)
    assert choices("2:4", ["global", "uniform"], [0.1, 0.9]) == [("global", 0.5)]
    assert len(choices("block:4x1", ["global", "uniform"], [0.1, 0.9])) == 4


def test_recipes_take_patterns_and_attention() -> None:
    content = {
        "model": {"factory": "prunekit.models:digits_mlp"},
        "structure": {"attention": [{"q": "a", "k": "b", "v": "c", "o": "d", "heads": 3}]},
        "prune": [{"name": "half", "structure": "2:4"}, {"name": "tiles", "structure": "block:4x1", "sparsity": 0.5}],
    }
    recipe = Recipe.of(content, "x.yaml")
    expected = {"q": "a", "k": "b", "v": "c", "qkv": None, "o": "d", "heads": 3, "kv_heads": None}
    assert recipe.structure.mappings() == [expected]
    for wrong in ({"q": "a", "o": "d"}, {"q": "a", "k": "b", "v": "c", "qkv": "e", "o": "d"}, {"o": "d"}):
        with pytest.raises(UsageError, match="give q, k and v, or qkv alone"):
            Recipe.of({**content, "structure": {"attention": [wrong]}}, "x.yaml")
    for change, message in (
        ({"structure": "4:2"}, r"prune\.0\.structure is '4:2'"),
        ({"structure": "channels"}, "needs a sparsity"),
        ({"structure": "1:4", "sparsity": 0.5}, "1:4 removes 0.75"),
    ):
        with pytest.raises(UsageError, match=message):
            Recipe.of({**content, "prune": [{"name": "x", **change}]}, "x.yaml")


def test_units_that_may_not_be_pruned_are_named() -> None:
    model = HANDLED["multilayer"]()
    scores = random_scores(model)
    scores.provenance["prunable"] = ["two.weight", "out.weight"]
    scores.importance.pop("one.weight")
    plan = make_plan(scores, model, IMAGES, sparsity=0.3, structure="channels")
    assert set(plan.keep) == {"two"}
    assert plan.provenance["refused"] == {"one": "one.weight is ignored (prunable.ignore) and would lose something with it"}
