"""The recipes that come with prunekit."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("digits-*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_they_keep_what_explain_needs_to_name_training_samples(path: Path) -> None:
    train = Recipe.load(path).train
    assert (train.record.every, train.record.states) == (1, "whole")
    assert train.record.second_moments == (train.optimizer.name != "sgd")
