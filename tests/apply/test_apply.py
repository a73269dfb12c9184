"""A pruned model is the masked model, and comes back from disk as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from prunekit import ArtifactError, Plan, StructureError, hold_masks, load, make_plan, masked, prune, save
from prunekit.apply import Manifest, dense_state
from prunekit.criteria import model_digest
from prunekit.plan import GROUPED
from tests.conftest import TinyNet, tiny_data
from tests.structure_models import CASES, HANDLED, IMAGES, Counting, random_scores


def trained_like(build: str | Callable[[], nn.Module]) -> nn.Module:
    """A model whose BatchNorm statistics have moved."""
    torch.manual_seed(0)
    model = HANDLED[build]() if isinstance(build, str) else build()
    model(torch.randn(50, 1, 4, 4))
    return model.eval()


@pytest.mark.parametrize(("structure", "name", "build"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_small_model_equals_masked_model(structure: str, name: str, build: Callable[[], nn.Module]) -> None:
    """In float64, to 1e-10, at three sparsities; and nothing stays that kept indices do not name."""
    model = trained_like(build).double()
    x = torch.randn(30, 1, 4, 4, dtype=torch.float64)
    for sparsity in (0.2, 0.5, 0.9):
        plan = make_plan(random_scores(model), model, IMAGES.double(), sparsity=sparsity, structure=structure)
        small = prune(model, plan, IMAGES.double())
        with torch.no_grad():
            torch.testing.assert_close(small(x), masked(model, plan)(x), atol=1e-10, rtol=1e-10)
        assert sparsity == 0.2 or any(not keep.all() for keep in plan.keep.values())
        kept = plan.kept_indices()
        named = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        for key, shape in plan.shapes.items():
            if any(key.startswith(f"{block}.") for block in plan.skipped()):
                assert key not in named
            else:
                assert list(named[key].shape) == [len(kept.get(f"{key}@{a}", range(s))) for a, s in enumerate(shape)]
        removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert plan.sparsity()["all"] == pytest.approx(removed / sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    ("structure", "name", "build"),
    [*CASES, *((s, n, b) for s in ("unstructured", "2:4", "block:2x3") for n, b in HANDLED.items())],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_saved_model_comes_back_exactly(tmp_path: Path, structure: str, name: str, build: Callable[[], nn.Module]) -> None:
    model = trained_like(build)
    x = torch.randn(30, 1, 4, 4)
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure=structure)
    small = prune(model, plan, IMAGES)
    save(small, plan, tmp_path / "a")
    back = load(tmp_path / "a", build)
    with torch.no_grad():
        assert torch.equal(back(x), small(x))
    saved = load_file(tmp_path / "a" / "model.safetensors")
    assert saved.keys() | Manifest.load(tmp_path / "a" / "prunekit.json").aliases.keys() == small.state_dict().keys()
    assert (tmp_path / "a" / "masks.safetensors").exists() == (structure not in GROUPED)
    sizes = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_groups", "num_channels", "num_heads")
    for key, module in small.named_modules():
        twin = back.get_submodule(key)
        assert type(twin) is type(module)
        assert {a: getattr(twin, a, None) for a in sizes} == {a: getattr(module, a, None) for a in sizes}


def test_saved_channels_take_less_room(tmp_path: Path) -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    save(prune(model, plan, IMAGES), plan, tmp_path / "a")
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    small, dense = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "dense.safetensors")
    assert sum(t.numel() for t in small.values()) < 0.6 * sum(t.numel() for t in dense.values())


@pytest.mark.slow
def test_loading_needs_no_torch_pruning(tmp_path: Path) -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    save(prune(model, plan, IMAGES), plan, tmp_path / "a")
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import prunekit; from tests.structure_models import Multilayer\n"
        f"print(sum(p.numel() for p in prunekit.load({str(tmp_path / 'a')!r}, Multilayer).parameters()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == sum(p.numel() for p in prune(model, plan, IMAGES).parameters())


def test_dense_coordinates_of_a_small_model_are_the_masked_weights() -> None:
    model = trained_like("joined")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    found = dense_state(prune(model, plan, IMAGES), plan)
    for name, tensor in masked(model, plan).named_parameters():
        assert torch.equal(found[name], tensor)


def test_masks_hold_in_anybodys_loop() -> None:
    torch.manual_seed(0)
    model = TinyNet()
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    small = prune(model, plan)
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1, weight_decay=0.1)
    x, y = tiny_data(16)
    before = small.conv.weight.detach().clone()
    with hold_masks(small, plan, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(small(x), y).backward()
            optimizer.step()
            for name, mask in plan.masks().items():
                assert not small.get_parameter(name)[~mask].any()
    assert not torch.equal(small.conv.weight, before)
    optimizer.step()
    assert small.conv.weight[~plan.masks()["conv.weight"]].any()  # the hook is gone


def test_a_fine_tuned_model_is_saved_and_a_broken_mask_is_not(tmp_path: Path) -> None:
    model = TinyNet()
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    small = prune(model, plan)
    with torch.no_grad():
        small.conv.weight[plan.masks()["conv.weight"]] += 1
    save(small, plan, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", TinyNet).conv.weight, small.conv.weight)
    with torch.no_grad():
        small.conv.weight += 1
    with pytest.raises(ArtifactError, match=r"conv\.weight has weights other than 0"):
        save(small, plan, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_surgery_that_changes_the_outputs_is_refused() -> None:
    """A plan made by hand that leaves out one half of what a channel takes along."""
    model = Counting()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    index = {"one|one.weight@0": torch.arange(8)[:, None], "one|one.bias@0": torch.arange(8)[:, None],
             "one|out.weight@1": torch.arange(8)[:, None]}  # fmt: skip
    facts = {"model": model_digest(model), "prunable": ["one.weight"]}
    plan = Plan("channels", {"one": torch.arange(8) > 3}, index, shapes, facts)
    with pytest.raises(StructureError, match="counts its units"):
        prune(model, plan, IMAGES)
    del index["one|out.weight@1"]
    with pytest.raises(StructureError, match="does not run"):
        prune(model, Plan("channels", {"one": torch.arange(8) > 3}, index, shapes, facts), IMAGES)


def test_a_plan_for_other_weights_is_refused() -> None:
    model = TinyNet()
    plan = make_plan(random_scores(model), model, sparsity=0.5)
    with pytest.raises(ArtifactError, match="the plan was made for model"):
        prune(TinyNet(), plan)


def test_grad_flags_and_mode_survive_surgery() -> None:
    model = trained_like("multilayer").train()
    model.two.requires_grad_(False)
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.3, structure="channels")
    small = prune(model, plan, IMAGES)
    assert small.training
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"two.weight", "two.bias"}


@pytest.mark.parametrize("name", ["model.safetensors", "prunekit.json"])
def test_damaged_folders_are_refused(tmp_path: Path, name: str) -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    save(prune(model, plan, IMAGES), plan, tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=name):
        load(tmp_path / "a", HANDLED["multilayer"])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model = trained_like("multilayer")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    save(prune(model, plan, IMAGES), plan, tmp_path / "a")
    with pytest.raises(ArtifactError, match="another architecture"):
        load(tmp_path / "a", HANDLED["residual"])
