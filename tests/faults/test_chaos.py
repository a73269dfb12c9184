"""Whoever is killed, a study loses nothing and comes to the same figures (``make chaos`` kills more often)."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.exhaustive
def test_a_worker_a_coordinator_and_a_rank_are_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    from tests.faults.chaos import KINDS, run

    done = run(tmp_path, len(KINDS), seed=0)
    assert done.faults == []
    assert done.hits == dict.fromkeys(KINDS, 1)
    assert done.through >= 1
