"""The recipe of cats and dogs, from the command line, on a small archive of the same format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cifar_archive import IMAGES, contents, pack

from .conftest import Cli


@pytest.mark.slow
def test_the_recipe_runs_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    """Its own options at a small width, with the path as a recipe's key; data that moves leaves the recording valid."""
    recipe = (Path(__file__).parents[2] / "recipes" / "cifar2-resnet9.yaml").read_text()
    changes = {
        "width: 64": "width: 2",
        "path: null": f"path: {pack(tmp_path / 'a.tar.gz', contents())}",
        "batch_size: 256": "batch_size: 9",
        "validation: 500, scoring: 500": "validation: 4, scoring: 4",
    }
    for old, new in changes.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    images = sum(label in (3, 5) for number in range(5) for label in np.arange(IMAGES + number) % 10)
    assert json.loads(done.out)["steps"] == 12 * (images // 9)
    moved = (tmp_path / "a.tar.gz").rename(tmp_path / "b.tar.gz")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("a.tar.gz", moved.name))
    again = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--json")
    assert (again.code, json.loads(again.out)["reused"]) == (0, True)
