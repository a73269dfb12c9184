"""A pruned model pruned again: one plan of the dense model for both, and the folder comes back from the dense factory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prunekit import ArtifactError, Plan, UsageError, hold_masks, load, make_plan, masked, prune, refine, save
from prunekit.apply import dense_state
from tests.repair.test_refine import trained
from tests.structure_models import ATTENTIVE, HANDLED, IMAGES, STACKED, random_scores

MODELS: dict[str, Callable[[], nn.Module]] = {**HANDLED, **ATTENTIVE, **STACKED}
PAIRS = [
    *((name, "channels", "channels") for name in HANDLED),
    *((name, "heads", "heads") for name in ATTENTIVE if name != "grouped queries"),
    ("blocks", "layers", "layers"), ("blocks", "layers", "channels"), ("blocks", "channels", "layers"),
    ("encoder", "channels", "heads"), ("encoder", "heads", "channels"), ("encoder", "heads", "unstructured"),
    ("flattened", "channels", "unstructured"), ("flattened", "unstructured", "channels"), ("blocks", "layers", "unstructured"),
    ("multilayer", "unstructured", "unstructured"), ("multilayer", "unstructured", "2:4"), ("joined", "channels", "2:4"),
    ("depthwise", "block:2x2", "channels"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_pruned_again(tmp_path: Path, name: str, first: str, second: str) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]()
    dense(torch.randn(50, 1, 4, 4))
    dense.eval()
    x = torch.randn(9, 1, 4, 4)
    one = make_plan(random_scores(dense), dense, IMAGES, sparsity=0.3, structure=first)
    save(prune(dense, one, IMAGES), one, tmp_path / "one")
    small = load(tmp_path / "one", MODELS[name])
    asked = None if second == "2:4" else 0.4
    two = make_plan(random_scores(small, seed=1), small, IMAGES, sparsity=asked, structure=second)
    smaller = prune(small, two, IMAGES)
    both = one.then(two)
    save(smaller, both, tmp_path / "two")
    back = load(tmp_path / "two", MODELS[name])
    with torch.no_grad():
        assert torch.equal(back(x), smaller(x))
        torch.testing.assert_close(masked(dense, both)(x), smaller(x), atol=1e-5, rtol=1e-5)
    assert Plan.load(tmp_path / "two" / "plan.safetensors").digest == both.digest
    states = masked(dense, both).state_dict()
    for key, tensor in dense_state(back, both).items():
        if states[key].is_floating_point():
            assert torch.equal(tensor, states[key])
    assert both.provenance["model"] == one.provenance["model"]
    dense_masks = one.masks()
    for key, mask in both.masks().items():
        assert key not in dense_masks or not (mask & ~dense_masks[key]).any()
    assert both.sparsity()["prunable"] >= one.sparsity()["prunable"]
    # And from dense to smallest in one go.
    with torch.no_grad():
        torch.testing.assert_close(prune(dense, both, IMAGES)(x), smaller(x), atol=1e-5, rtol=1e-5)


def test_three_times(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = MODELS["encoder"]().eval()
    model, plan = dense, None
    for seed, structure in enumerate(("channels", "heads", "channels")):
        found = make_plan(random_scores(model, seed), model, IMAGES, sparsity=0.15, structure=structure)
        model = prune(model, found, IMAGES)
        plan = found if plan is None else plan.then(found)
        save(model, plan, tmp_path / "a")
        model = load(tmp_path / "a", MODELS["encoder"])
    assert plan is not None
    x = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(masked(dense, plan)(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("second", ["2:4", "unstructured"])
def test_the_second_plan_is_refined_inside_the_first(second: str) -> None:
    """On the model that the first one left: both patterns stay exact, and the small model is what comes closer."""
    dense, batches = trained("flattened")
    one = make_plan(random_scores(dense), dense, IMAGES, sparsity=0.4, structure="channels", allocation="uniform")
    small = prune(dense, one, IMAGES).eval()
    two = make_plan(random_scores(small, seed=1), small, sparsity=None if second == "2:4" else 0.5, structure=second)
    better = refine(two, small, batches, rounds=12, learn=False)
    given, both = one.then(two), one.then(better)
    facts = better.provenance["refine"]
    assert facts["changed"]
    assert facts["after"]["accept"] < facts["before"]["accept"]
    for name in one.keep:
        assert torch.equal(both.keep[name], one.keep[name])
    for name, mask in both.masks().items():
        assert not (mask & ~one.masks().get(name, mask)).any()
    assert both.sparsity() == pytest.approx(given.sparsity())
    if second == "2:4":
        for keep in better.keep.values():
            whole = keep.flatten(1)[:, : keep[0].numel() // 4 * 4]
            assert (whole.unflatten(1, (-1, 4)).sum(2) == 2).all()
    x = torch.randn(9, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(prune(small, better)(x), masked(dense, both)(x), atol=1e-5, rtol=1e-5)


def test_a_plan_for_another_model_is_no_second_one() -> None:
    model = MODELS["multilayer"]()
    one = make_plan(random_scores(model), model, IMAGES, sparsity=0.3, structure="channels")
    with pytest.raises(UsageError, match="the second plan is of another model"):
        one.then(one)


def test_masks_hold_on_a_cut_model() -> None:
    torch.manual_seed(0)
    dense = MODELS["flattened"]()
    one = make_plan(random_scores(dense), dense, IMAGES, sparsity=0.3, structure="channels")
    small = prune(dense, one, IMAGES)
    two = make_plan(random_scores(small), small, sparsity=0.5)
    smaller, both = prune(small, two), one.then(two)
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    before = smaller.get_parameter("hidden.weight").detach().clone()
    with hold_masks(smaller, both, optimizer):
        smaller(torch.randn(8, 1, 4, 4)).square().mean().backward()
        optimizer.step()
        for name, mask in two.masks().items():
            assert not smaller.get_parameter(name)[~mask].any()
    assert not torch.equal(before, smaller.get_parameter("hidden.weight"))


@pytest.mark.parametrize(
    "change",
    [
        {"replaced": {"attention": "os.system"}},
        {"replaced": {"": "skip"}},
        {"attributes": {"attention": {"forward": 1}}},
        {"attributes": {"attention": {"num_heads": True}}},
        {"attributes": {"attention": {"num_heads": 400}}},
        {"attributes": {"norm": {"num_heads": 2}}},
        {"replaced": {"norm": "attention"}},
        {"replaced": {"nowhere": "skip"}},
    ],
)
def test_a_manifest_sets_sizes_and_nothing_else(tmp_path: Path, change: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = MODELS["separate"]()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.2, structure="heads")
    save(prune(model, plan, IMAGES), plan, tmp_path / "a")
    path = tmp_path / "a" / "prunekit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=r"prunekit\.json|architecture"):
        load(tmp_path / "a", MODELS["separate"])
