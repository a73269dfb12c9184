"""docs/jobs/table-for-a-paper.sh as it is written, on a small study."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import RECIPE

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "jobs" / "table-for-a-paper.sh"
STUDY = """
cases: {small_net: small.yaml}
seeds: [0, 1, 2]
samples: 16
criteria: [magnitude, random]
structures: {channels: [0.3, 0.6]}
allocations: {channels: [global]}
control: false
tune: {epochs: 1, sparsities: {channels: [0.6]}}
"""


def test_it_is_one_command() -> None:
    lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("prunekit")]
    assert len(lines) == 1
    assert lines[0].startswith("prunekit compare ")
    (recipe,) = re.findall(r"recipes/[\w.-]+", SCRIPT.read_text())
    assert (ROOT / recipe).is_file()


@pytest.mark.exhaustive  # trains three small nets: the job from its beginning to its end
def test_the_job_from_one_command(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE.replace("epochs: 3", "epochs: 2"))
    (tmp_path / "study.yaml").write_text(STUDY)
    command = tmp_path / "bin" / "prunekit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m prunekit "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    asked = {"STUDY": "study.yaml", "OUT": "out", "TABLE": "table.tex"}
    done = subprocess.run(
        ["sh", str(SCRIPT)], cwd=tmp_path, env={**os.environ, **paths, **asked},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "table.tex").read_text()
    assert made.count("\\begin{table}") == made.count("\\end{table}") == 2
    assert "Test accuracy" in made
    assert "3 seeds (0, 1, 2)" in made
    assert "small\\_net" in made
    assert "dense, fine-tuned &" in made
    for name in ("compare.csv", "compare.png", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size
