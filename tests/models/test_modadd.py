"""The transformer of modular addition against the task's description, written out in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit import UsageError
from prunekit.data import modadd
from prunekit.models import modadd_transformer
from prunekit.recipe import Recipe
from prunekit.trajectory import Layout
from prunekit.verbs.checks import try_once
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
    try_once(recipe, model, splits)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 4000, "validation": 2000, "test": 241, "scoring": 200,
    }  # fmt: skip
    optimizer, schedule = recipe.build_optimizer(model, 4000)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], schedule) == (1e-3, (0.9, 0.98), 4.0, None)
    assert Layout.of(model).total == 89_024


@pytest.mark.skipif(
    importlib.util.find_spec("explaind") is None,
    reason="explaind is not installed: pip install --no-deps --ignore-requires-python explaind==0.1.0 tqdm",
)
def test_it_is_the_paper_authors_own_model() -> None:
    """Their weights in our model give their log-probabilities, and our initial weights are spread as theirs."""
    from explaind.modulo_model.model import SingleLayerTransformerClassifier

    torch.manual_seed(0)
    theirs, ours = SingleLayerTransformerClassifier(115, d_model=64, nhead=4, dim_mlp=512, dropout=0.0), modadd_transformer()
    renamed = {"input_emb": "embedding", "linear1": "up", "linear2": "down", "decoder": "classifier"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in renamed:
            state[f"{renamed[module]}.{kind}"] = tensor
    heads = [f"head{number}" for number in range(1, 5)]
    state["attention.projection.weight"] = torch.cat([theirs.state_dict()[f"{head}_encoder.weight"] for head in heads])
    state["attention.combine.weight"] = torch.cat([theirs.state_dict()[f"{head}_decoder.weight"] for head in heads], 1)
    for name, tensor in ours.state_dict().items():
        assert float(tensor.std()) == pytest.approx(float(state[name].std()), rel=0.15), name
    ours.load_state_dict(state)
    x = modadd()["validation"][0]
    torch.testing.assert_close(ours(x).log_softmax(-1), theirs(x), atol=1e-4, rtol=1e-4)
