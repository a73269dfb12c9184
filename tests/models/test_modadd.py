"""The transformer of modular addition against the task's description, written out in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit import UsageError
from prunekit.models import modadd_transformer
from prunekit.recipe import Recipe
from prunekit.trajectory import Layout
from prunekit.verbs.probe import probe
from prunekit.verbs.run_folder import load_splits


def straightforward(weights: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """One sample and head at a time, every position computed, the last one decoded."""
    embedding = weights["embedding.weight"]
    width = embedding.shape[1]
    size = width // heads
    rows = []
    for tokens in x:
        h = embedding[tokens] * width**0.5
        attended = torch.zeros_like(h)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            p = h @ weights["attention.projection.weight"][part].T
            attended = attended + ((p @ p.T) / size**0.5).softmax(1) @ p @ weights["attention.combine.weight"][:, part].T
        hidden = F.relu(attended @ weights["up.weight"].T + weights["up.bias"])
        out = attended + F.relu(hidden @ weights["down.weight"].T + weights["down.bias"])
        rows.append((out @ weights["classifier.weight"].T)[-1])
    return torch.stack(rows)


def test_it_computes_what_the_task_describes() -> None:
    torch.manual_seed(0)
    model = modadd_transformer(11, 12, 3, 20).double()
    x = torch.randint(0, 13, (6, 4))
    expected = straightforward(dict(model.named_parameters()), x, 3)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)


def test_size_and_initial_ranges_are_those_of_separate_heads() -> None:
    model = modadd_transformer()
    assert model(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 115)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in str(modadd_transformer.__doc__)
    reach = {name: float(p.detach().abs().max()) for name, p in model.named_parameters()}
    assert 0.99 * 16**-0.5 < reach["attention.combine.weight"] <= 16**-0.5
    assert 0.99 * 64**-0.5 < reach["attention.projection.weight"] <= 64**-0.5


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match="do not divide"):
        modadd_transformer(width=10, heads=4)


def test_the_recipe_fits_its_own_pieces_together() -> None:
    recipe = Recipe.load(Path(__file__).parents[2] / "recipes" / "modadd-transformer.yaml")
    model, splits = recipe.build_model(), load_splits(recipe)
    probe(recipe, model, splits)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 4000, "validation": 2000, "test": 241, "scoring": 200,
    }  # fmt: skip
    optimizer, schedule = recipe.build_optimizer(model, 4000)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], schedule) == (1e-3, (0.9, 0.98), 4.0, None)
    assert Layout.of(model).total == 89_024
