"""Repairs shared by ranks: the same bits on all of them, the same masks as in one process, whatever does not divide."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ranks_of import Ranks
from tests.repair.on_ranks import repaired

MANY = (2, 3)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return repaired()


@pytest.fixture(scope="module", params=MANY)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = Ranks(request.param, "tests.repair.on_ranks", folder).done()
    assert [one.code for one in done] == [0] * request.param, done[-1].err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.slow
def test_all_ranks_find_the_same_bits(together: list[dict[str, Any]]) -> None:
    for other in together[1:]:
        assert other["repaired"] == together[0]["repaired"]
        assert other["pieces"] == together[0]["pieces"] == 6


@pytest.mark.slow
def test_masks_are_those_of_one_process(together: list[dict[str, Any]], alone: dict[str, dict[str, Any]]) -> None:
    for name, expected in alone.items():
        found = together[0]["repaired"][name]
        assert found["keep"] == expected["keep"], name
        assert (found["changed"], found["ended"]) == (expected["changed"], expected["ended"]), name
        for mine, one in zip(found["history"], expected["history"], strict=True):
            assert mine == pytest.approx(one, rel=1e-9), name
    assert all(each["changed"] for name, each in alone.items() if name != "no time")


@pytest.mark.slow
def test_time_is_over_by_the_first_clock(together: list[dict[str, Any]]) -> None:
    assert together[0]["repaired"]["no time"]["ended"] == "budget"


@pytest.mark.slow
def test_gradients_add_up_in_any_order(together: list[dict[str, Any]]) -> None:
    total = sum(range(1, len(together) + 1))
    for each in together:
        for number, values in enumerate(each["exchanged"], 1):
            assert values == [total - 1.0 if number == 2 else float(total)] * (2 * number)


@pytest.mark.slow
def test_ranks_that_disagree_say_so(together: list[dict[str, Any]]) -> None:
    for each in together:
        assert each["disagreed"].startswith("the mask: rank 1")
