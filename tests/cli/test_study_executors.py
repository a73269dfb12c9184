"""A study's cells by workers: the same figures whatever does them, without a shared disk (kills: tests/faults/chaos.py)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunekit import run_study
from prunekit.errors import ArtifactError, UsageError
from prunekit.verbs import study_travel, study_worker, studying
from prunekit.verbs.run_folder import Run


@contextmanager
def apart(out: Path) -> Iterator[tuple[str, str]]:
    """The coordinator's disk is one that no worker sees."""
    yield str(out / "nowhere"), out.absolute().as_posix().replace("/", "-")


@pytest.mark.slow
def test_without_a_shared_disk_runs_travel(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(study, tmp_path / "one")
    figures = (tmp_path / "one" / "compare.csv").read_text()
    monkeypatch.setattr(studying, "_token", apart)
    with ThreadPoolExecutor(2) as pool:
        run_study(study, tmp_path / "apart", executor=pool)
        assert (tmp_path / "apart" / "compare.csv").read_text() == figures
        made = Run(tmp_path / "apart" / "runs" / "small-seed1")
        assert made.trajectory.hash == Run(tmp_path / "one" / "runs" / "small-seed1").trajectory.hash
        # workers that have lost what they had, and a coordinator that has lost some cells: runs travel to where they lack
        before = (made.path / "trajectory" / "trajectory.json").stat().st_mtime_ns
        shutil.rmtree(study_travel._scratch())
        (tmp_path / "apart" / "cells" / "small-seed0" / "unstructured" / "random.json").unlink()
        run_study(study, tmp_path / "apart", executor=pool)
    assert (tmp_path / "apart" / "compare.csv").read_text() == figures
    assert (made.path / "trajectory" / "trajectory.json").stat().st_mtime_ns == before  # nothing was trained again


def test_what_is_too_large_to_travel_is_refused_before_it_is_trained(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studying, "_token", apart)
    monkeypatch.setattr(study_worker, "WIRE", 1000)
    out = study.parent / "out"
    with pytest.raises(ArtifactError, match=r"^small, seed 0: the trajectory takes .* MB, at most 0.001 MB travel"):
        run_study(study, out)
    assert not (out / "runs").exists()


def test_a_worker_of_another_version_is_refused(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_travel, "__version__", "0.0.9")
    with pytest.raises(UsageError, match=r"small, seed 0: a worker has prunekit 0.0.9, the study is run by"):
        run_study(study, study.parent / "out")


@pytest.mark.parametrize("name", ["../up", "trajectory/../../up", "other/file", "/etc/file"])
def test_files_travel_into_a_run_folder_alone(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no file of a run"):
        study_travel.unpack({name: b""}, tmp_path / "run")
    assert not (tmp_path / "up").exists()
