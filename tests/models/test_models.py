"""The models that recipes name compute what they say, and every recipe loads and takes the structures that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prunekit import UsageError
from prunekit.models import digits_cnn, digits_mlp, digits_transformer, gpt2, llama, mixtral
from prunekit.models.digits import Attention
from prunekit.plan import GROUPED
from prunekit.recipe import Recipe
from prunekit.structure import find_groups, prunable_parameters
from prunekit.trajectory import Layout

LANGUAGE = sorted((Path(__file__).parents[2] / "recipes" / "lm-comparison").glob("*.yaml"))
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("digits-*.yaml"))


@pytest.mark.parametrize("build", [digits_cnn, digits_mlp, digits_transformer])
def test_sizes_that_the_docstrings_give(build: object) -> None:
    model = build()  # type: ignore[operator]
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in str(build.__doc__)


@pytest.mark.parametrize("build", [gpt2, llama, mixtral])
def test_sizes_of_language_models(build: object) -> None:
    pytest.importorskip("transformers")
    model = build()  # type: ignore[operator]
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in str(build.__doc__)


@pytest.mark.parametrize(("build", "sizes"), [(gpt2, {"heads": 5}), (llama, {"kv_heads": 4}), (mixtral, {"experts": 1})])
def test_language_models_of_sizes_that_do_not_fit_are_refused(build: object, sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="no size may be below 1"):
        build(**sizes)  # type: ignore[operator]


@pytest.mark.parametrize("path", LANGUAGE, ids=lambda p: p.stem)
def test_studies_of_language_models_have_the_units_that_they_prune(path: Path) -> None:
    pytest.importorskip("transformers")
    model = Recipe.load(path).build_model()
    for structure in ["heads", "layers", "experts" if "mixtral" in path.stem else "neurons"]:
        assert find_groups(structure, model, torch.zeros(2, 16, dtype=torch.long))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs_with_shared_keys(kv_heads: int) -> None:
    torch.manual_seed(0)
    ours = Attention(12, 4, kv_heads).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (
        layer(x).view(2, 5, -1, 3).transpose(1, 2) for layer in (ours.q_proj, ours.k_proj, ours.v_proj)
    )  # fmt: skip
    shared = [t[:, [h // (4 // kv_heads) for h in range(4)]] for t in (k, v)]
    expected = ours.o_proj(F.scaled_dot_product_attention(q, *shared).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(ours(x), expected, atol=1e-12, rtol=1e-12)


def test_sizes_that_do_not_divide_are_refused() -> None:
    for sizes in ({"width": 10, "heads": 4}, {"heads": 4, "kv_heads": 3}):
        with pytest.raises(UsageError, match="must divide each other"):
            digits_transformer(**sizes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_load_and_their_models_take_their_structures(path: Path) -> None:
    recipe = Recipe.load(path)
    model = recipe.build_model()
    prunable = prunable_parameters(model, Layout.of(model), recipe.prunable.ignore)
    assert not any(name.startswith("classifier") for name in prunable)
    for structure in {*recipe.compare.structures, *(p.structure for p in recipe.prune)} & set(GROUPED):
        assert find_groups(structure, model, torch.randn(2, 1, 8, 8))
