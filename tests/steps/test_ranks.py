"""Fine-tuning shared by two ranks: the weights of one process where nothing mixes a batch, a path that can be taken again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks_of import Ranks
from tests.steps.on_ranks import results

MANY = 2


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = Ranks(MANY, "tests.steps.on_ranks", folder).done()
    assert [one.code for one in done] == [0] * MANY, done[-1].err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(MANY)]


@pytest.mark.slow
def test_all_ranks_have_the_same_model(together: list[dict[str, Any]]) -> None:
    """Weights, masks, running statistics, losses, and the state of random numbers, bit by bit."""
    assert together[1] == together[0]


@pytest.mark.slow
def test_it_is_the_model_of_one_process(together: list[dict[str, Any]], tmp_path: Path) -> None:
    """With class weights, labels that do not count, a layer without gradients, a teacher, and a batch of one sample."""
    for name, alone in results(tmp_path)["same"].items():
        found = together[0]["same"][name]
        assert found.get("keep") == alone.get("keep"), name
        if alone["losses"]:
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-12), name
        for tensor, values in alone["state"].items():
            assert found["state"][tensor] == pytest.approx(values, rel=1e-10, abs=1e-13), f"{name}: {tensor}"


@pytest.mark.slow
def test_the_recorded_steps_can_be_taken_again(together: list[dict[str, Any]]) -> None:
    """Every rank's samples, weights, augmentation and dropout."""
    assert all(each["recorded"] for each in together)
