"""Repairs shared by ranks: the same bits on all of them, the same masks as in one process, whatever does not divide."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.repair.on_ranks import repaired

MANY = (3,)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return repaired()


@pytest.fixture(scope="module", params=MANY)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(request.param), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "tests.repair.on_ranks", str(folder)]
    started = [subprocess.Popen(call, env={**os.environ, **where, "RANK": str(rank)}) for rank in range(request.param)]
    try:
        assert [one.wait(timeout=300) for one in started] == [0] * request.param
    finally:
        for one in started:
            one.kill()
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.slow
def test_all_ranks_find_the_same_bits(together: list[dict[str, Any]]) -> None:
    for other in together[1:]:
        assert other["repaired"] == together[0]["repaired"]


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
