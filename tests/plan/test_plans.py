"""Plans remove what was asked, exactly; and what they hold can be trusted and edited."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunekit import ArtifactError, Plan, UsageError, make_plan, refine
from prunekit.criteria import model_digest
from prunekit.plan import ACROSS, ALLOCATIONS
from prunekit.plan.allocation import Request, share
from prunekit.plan.unstructured import unstructured_masks
from prunekit.trajectory import Layout
from tests.conftest import tiny_data
from tests.structure_models import HANDLED, IMAGES, random_scores


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sparsity=st.floats(0, 1, exclude_max=True),
    levels=st.integers(1, 4),
    allocation=st.sampled_from(list(ALLOCATIONS)),
)
def test_exactly_the_asked_number_goes_ties_included(sizes: list[int], sparsity: float, levels: int, allocation: str) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    importance = {str(n): torch.randint(0, levels, (size,), generator=generator).float() for n, size in enumerate(sizes)}
    request = Request(sparsity, {name: tuple(v.shape) for name, v in importance.items()})
    masks = unstructured_masks(importance, sparsity, partial(share, allocation=ALLOCATIONS[allocation], request=request))
    total = sum(sizes)
    assert sum(int((~m).sum()) for m in masks.values()) == round(sparsity * total)
    if allocation == "global":
        kept = [v for n, v in importance.items() for v in v[masks[n]].tolist()]
        gone = [v for n, v in importance.items() for v in v[~masks[n]].tolist()]
        assert not kept or not gone or max(gone) <= min(kept)
    elif allocation == "uniform":
        for mask in masks.values():
            assert abs(int((~mask).sum()) - sparsity * len(mask)) <= 1


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(HANDLED)),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 5),
    allocation=st.sampled_from(ACROSS),
)
def test_channels_are_nearest_and_no_layer_dies(name: str, sparsity: float, seed: int, allocation: str) -> None:
    model = HANDLED[name]()
    scores = random_scores(model, seed)
    plan = make_plan(scores, model, IMAGES, sparsity=sparsity, structure="channels", allocation=allocation)
    assert all(keep.any() for keep in plan.keep.values())
    reached = plan.sparsity()["prunable"]
    masks = plan.masks()
    removed = sum(int((~masks[n]).sum()) for n in scores.importance if n in masks)
    assert reached == pytest.approx(removed / sum(v.numel() for v in scores.importance.values()))
    # one channel more or less, whichever, of any group: the asked share lies within one channel's worth
    sizes = {e.name: e.shape for e in Layout.of(model)}
    largest = max(
        sum(index.shape[1] * torch.Size(sizes[m.rsplit("@", 1)[0]]).numel() / sizes[m.rsplit("@", 1)[0]][int(m[-1])]
            for m, index in ((k.split("|")[1], v) for k, v in plan.index.items() if k.split("|")[0] == group)
            if m.rsplit("@", 1)[0] in scores.importance)
        for group in plan.keep
    )  # fmt: skip
    share = largest / sum(v.numel() for v in scores.importance.values())
    at_floor = all(int(keep.sum()) == 1 for keep in plan.keep.values())
    assert abs(reached - sparsity) <= share / 2 + 1e-9 or (at_floor and reached < sparsity)


def test_importance_decides_which_channels_go() -> None:
    model = HANDLED["multilayer"]()
    scores = random_scores(model)
    for tensor in scores.importance.values():
        tensor.fill_(1.0)
    scores.importance["one.weight"][3] = 1e-6
    scores.importance["two.weight"][:, 3] = 1e-6
    total = sum(v.numel() for v in scores.importance.values())
    plan = make_plan(scores, model, IMAGES, sparsity=(16 + 7) / total, structure="channels")
    assert (~plan.keep["one"]).nonzero().flatten().tolist() == [3]
    assert plan.keep["two"].all()


@pytest.mark.parametrize("structure", ["unstructured", "channels"])
def test_saved_plans_come_back(tmp_path: Path, structure: str) -> None:
    model = HANDLED["residual"]()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure=structure)
    plan.save(tmp_path / "plan.safetensors")
    back = Plan.load(tmp_path / "plan.safetensors")
    assert back.digest == plan.digest
    assert not back.provenance.get("edited")
    assert {k: v.tolist() for k, v in back.masks().items()} == {k: v.tolist() for k, v in plan.masks().items()}


@pytest.mark.parametrize("structure", ["unstructured", "channels"])
def test_what_a_refined_plan_was_given_comes_back(tmp_path: Path, structure: str) -> None:
    model, path = HANDLED["residual"](), tmp_path / "plan.safetensors"
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure=structure)
    assert plan.before is None
    x, y = tiny_data(24)
    refined = refine(plan, model, [(x, y)], rounds=3, learn=False)
    again = refine(refined, model, [(x, y)], rounds=3, learn=False, seed=1)
    for first, made in ((plan, refined), (refined, again)):
        made.save(path)
        back = Plan.load(path)
        assert back.digest == made.digest
        assert back.before is not None
        assert back.before.keep.keys() == first.keep.keys()
        assert all(torch.equal(back.before.keep[n], k) for n, k in first.keep.items())
        assert {n: m.tolist() for n, m in back.before.masks().items()} == {n: m.tolist() for n, m in first.masks().items()}
    assert refined.before is not None
    assert refined.before.digest == plan.digest == refined.provenance["refine"]["from"]
    name = next(iter(plan.keep))
    edit(path, f"given/{name}", (~again.given[name]).to(torch.uint8))
    assert Plan.load(path).provenance["edited"]
    edit(path, f"given/{name}", torch.ones(1, dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="what was refined"):
        Plan.load(path)
    older = dataclasses.replace(refined, given={})  # as prunekit wrote them before there was a record
    older.save(path)
    assert Plan.load(path).digest == older.digest
    assert Plan.load(path).before is None


def edit(path: Path, name: str, value: torch.Tensor) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), name: value}, path, metadata=metadata)


def test_plans_can_be_edited_by_hand(tmp_path: Path) -> None:
    model = HANDLED["multilayer"]()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    edit(path, "keep/one", torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8))
    back = Plan.load(path)
    assert back.provenance["edited"]
    assert back.kept_indices()["two.weight@1"].tolist() == [0, 8]
    assert back.digest != plan.digest


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(9, dtype=torch.uint8), "lose all of its 9 channels"),
        (torch.ones(8, dtype=torch.uint8), r"one has shape \(8,\), expected \(9,\)"),
        (torch.full((9,), 2, dtype=torch.uint8), "must hold 0 and 1 only"),
    ],
)
def test_edits_that_cannot_be_carried_out_are_refused(tmp_path: Path, value: torch.Tensor, message: str) -> None:
    model = HANDLED["multilayer"]()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    edit(path, "keep/one", value)
    with pytest.raises(ArtifactError, match=message):
        Plan.load(path)


def test_scores_of_other_weights_are_refused_with_both_hashes() -> None:
    model = HANDLED["multilayer"]()
    scores = random_scores(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.one.weight[0, 0] += 1
    with pytest.raises(ArtifactError, match=f"{model_digest(model)}.*{model_digest(other)}"):
        make_plan(scores, other, sparsity=0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    model = HANDLED["multilayer"]()
    with pytest.raises(UsageError, match="sparsity is"):
        make_plan(random_scores(model), model, sparsity=sparsity)


def test_unknown_names_are_refused() -> None:
    model = HANDLED["multilayer"]()
    with pytest.raises(UsageError, match="did you mean channels"):
        make_plan(random_scores(model), model, sparsity=0.5, structure="channel")
    with pytest.raises(UsageError, match="did you mean uniform"):
        make_plan(random_scores(model), model, sparsity=0.5, allocation="unifrom")
    with pytest.raises(UsageError, match="needs example_inputs"):
        make_plan(random_scores(model), model, sparsity=0.5, structure="channels")
