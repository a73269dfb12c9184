"""A changed file is refused in one line, or changes nothing: some mutations; ``make fuzz`` tries 10,000."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.exhaustive
def test_changed_files_are_refused_or_change_nothing() -> None:
    asked = [sys.executable, "-m", "tests.faults.fuzz", "300", "--seed", "1"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 mutations: " in done.stdout
    assert done.stdout.rstrip().endswith("; 0 faults")
