"""A rank that is killed at a random moment takes the other with it, and nothing else (``make chaos`` kills more often)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.bench import Bench
from tests.faults.kill_ranks import check


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["refine"])
def test_a_killed_rank_leaves_nothing_half_done(tmp_path: Path, name: str) -> None:
    assert check(Bench(tmp_path), name, 2, random.Random(0)) == []
