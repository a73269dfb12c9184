"""Studies on a store: the same result as on a disk, put whole and in order, gone on with elsewhere, by one at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunekit import Recorder, Trajectory, lease, run_study, trust
from prunekit.errors import ArtifactError, UsageError
from prunekit.remote import Remote
from prunekit.verbs import study_folder, study_worker, studying
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import Cli
from tests.stores import LateStore


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    LateStore.requests.clear()
    LateStore.broken.clear()
    another_machine(tmp_path / "first machine", monkeypatch)
    monkeypatch.setattr(lease, "BEAT", 0.05)
    yield
    LateStore.broken.clear()


def another_machine(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.STATE, str(state))


def left_here() -> list[str]:
    """Files of studies that this machine still has."""
    return sorted(path.name for path in (trust.state() / "studies").rglob("*") if path.is_file())


def cells_done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with the kinds of the cells that are measured, and ``trained``."""
    done: list[str] = []

    def measure(source: Any, kind: str, *rest: Any) -> Any:
        done.append(kind)
        return study_worker.measure(source, kind, *rest)

    class Noted(Recorder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            done.append("trained")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(studying, "measure", measure)
    monkeypatch.setattr("prunekit.verbs.training.Recorder", Noted)
    return done


ALL = sorted(["trained", "one_shot", "one_shot", "dense_tuned", "fine_tuned"] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "late"])
def test_a_study_on_a_store_is_that_on_a_disk(kind: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"memory://{uuid.uuid4().hex}/study" if kind == "memory" else f"late://{tmp_path}/store"
    done = cells_done(monkeypatch)
    run_study(study, tmp_path / "local")
    done.clear()
    there = run_study(study, store)
    assert sorted(done) == ALL
    files = {path.relative_to(tmp_path / "local").as_posix() for path in (tmp_path / "local").rglob("*") if path.is_file()}
    assert {name for name in files if not name.rpartition("/")[2].startswith(".")} == set(Remote(store).files())
    figures = (tmp_path / "local" / "compare.csv").read_bytes()
    assert Remote(f"{store}/compare.csv").beginning(10**6) == figures
    assert [run["run"] for run in there.runs] == ["runs/small-seed0", "runs/small-seed1"]
    assert Trajectory(f"{store}/runs/small-seed0/trajectory").hash == Run(tmp_path / "local/runs/small-seed0").trajectory.hash
    assert left_here() == []

    done.clear()
    LateStore.requests.clear()
    another_machine(tmp_path / "second machine", monkeypatch)
    run_study(study, store)
    assert done == []  # nothing is measured or trained again
    assert Remote(f"{store}/compare.csv").beginning(10**6) == figures
    put = {name for what, name in LateStore.requests if what == "put"}
    assert put <= {lease.NAME, "recipe.yaml", "compare.csv", "compare.png", "report.html", "compare.json"}


@pytest.mark.slow
def test_what_tells_of_others_is_put_last_and_a_store_that_fails_loses_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = f"late://{tmp_path}/store", tmp_path / "store"
    done, order = cells_done(monkeypatch), list[str]()
    for broken in ("magnitude.safetensors", "random.json", "compare.png"):
        done.clear()
        LateStore.broken = {broken}
        with pytest.raises(ArtifactError, match=re.escape(broken)) as said:
            run_study(study, store)
        assert "\n" not in str(said.value)
        kept = Path(re.findall(r"everything finished is kept in (.*), and the same command goes on with it$", str(said.value))[0])
        assert not (folder / "compare.json").exists()
        assert bool(list(folder.glob("runs/*/trajectory/trajectory.json"))) == (broken != "magnitude.safetensors")
        assert (kept / "runs" / "small-seed0" / "trajectory" / "trajectory.json").exists()
        assert not (folder / lease.NAME).exists()
        order += done
    LateStore.broken = set()
    LateStore.requests.clear()
    done.clear()
    run_study(study, store)
    assert done == []  # all of it was kept here
    assert len(list(folder.glob("cells/*/*/*.json"))) == len(ALL) - order.count("trained")
    assert sorted(order) == ALL
    assert [name for what, name in LateStore.requests if what == "put" and name != lease.NAME][-1] == "compare.json"
    assert left_here() == []
    LateStore.broken = {"report.html"}
    with pytest.raises(ArtifactError, match=r"report\.html"):
        run_study(study, store)
    assert not (folder / "compare.json").exists()  # it would tell of files that are replaced


@pytest.mark.slow
def test_the_stores_cells_count_and_what_is_no_cell_there_is_left(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older copy here, hidden and foreign names there, a recording that is not whole: none is taken for what is finished."""
    store, folder = f"late://{tmp_path}/store", tmp_path / "store"
    run_study(study, store)
    figures = (folder / "compare.csv").read_text()
    mine = study_folder.StudyFolder(store).folder
    shutil.copytree(folder, mine)
    stale = mine / "cells/small-seed0/unstructured/random.json"
    stale.write_text("{}")
    (folder / "cells/small-seed0/.hidden.json").write_text("{}")
    (folder / "cells/small-seed0/notes.txt").write_text("mine")
    (folder / "runs/small-seed1/trajectory/trajectory.json").unlink()
    shutil.rmtree(mine / "runs/small-seed1")
    (folder / "cells/small-seed1/unstructured/magnitude.json").write_text('{"half')
    done = cells_done(monkeypatch)
    run_study(study, store)
    assert done == ["trained", "one_shot"]
    assert (folder / "compare.csv").read_text() == figures
    assert (folder / "cells/small-seed0/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../../up.json", "a/../../../up.json", "/etc/x.json", "a//b.json", ".hidden.json"])
def test_a_stores_names_lead_nowhere_else(name: str) -> None:
    assert study_folder._below("cells/a", [f"cells/a/{name}", "cells/a/good.json", "cells/ab.json"]) == ["cells/a/good.json"]


def test_of_two_coordinators_one_works(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"late://{tmp_path}/store"
    with study_folder.StudyFolder(store).opened():
        with pytest.raises(ArtifactError, match=rf"{store}: another prunekit is writing here"):
            run_study(study, store)  # of this machine, at once
        another_machine(tmp_path / "second machine", monkeypatch)
        with pytest.raises(ArtifactError, match=rf"{store}: another prunekit \(on .*:{os.getpid()}\) is at work there"):
            run_study(study, store)
        assert left_here() == []
    assert not (tmp_path / "store" / lease.NAME).exists()


@pytest.mark.slow
def test_whoever_lost_the_place_ends(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"late://{tmp_path}/store"

    def measure(*arguments: Any) -> Any:
        (tmp_path / "theirs").write_text("theirs 0 elsewhere:7 1\n")
        (tmp_path / "theirs").replace(tmp_path / "store" / lease.NAME)  # whole, as a store takes it
        return study_worker.measure(*arguments)

    monkeypatch.setattr(studying, "measure", measure)
    with pytest.raises(ArtifactError, match=r"another prunekit \(on elsewhere:7\) has gone on there; this one ends; everything"):
        run_study(study, store)
    assert (tmp_path / "store" / lease.NAME).read_text().startswith("theirs")
    assert not list((tmp_path / "store").glob("cells/*/*/*.json"))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("s3:/bucket/study", "looks like an address of a store"),
        ("memory://study", "the memory of this command, which ends with it; in Python call prunekit.run_study"),
        ("nothing://study", "Protocol not known"),
        ("late://", "late:// names no folder there"),
    ],
)
def test_a_place_that_will_not_do_is_one_line(out: str, said: str, study: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("compare", study, "--out", out)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "small.yaml", "study.yaml", "__pycache__"}


def test_a_store_that_takes_nothing_is_one_line(study: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateStore, "broken", {lease.NAME})
    done = cli("compare", study, "--out", f"late://{tmp_path}/store")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert "could not be written (ConnectionError: gone)" in done.err
    assert left_here() == []
    with pytest.raises(UsageError, match="give it as text, with both slashes"):
        run_study(study, Path("s3://bucket/study"))


@pytest.mark.exhaustive
def test_the_coordinator_is_killed_and_another_machine_goes_on(
    study: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes the first time; then a worker of Dask's, which is killed too."""
    pytest.importorskip("distributed")
    run_study(study, tmp_path / "one")
    figures, store = (tmp_path / "one" / "compare.csv").read_text(), tmp_path / "store"
    program = (
        "import sys\nfrom tests.stores import LateStore\nfrom prunekit import lease\nfrom prunekit.cli import main\n"
        "if __name__ == '__main__':\n    lease.BEAT = 0.05\n    main()\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [
        sys.executable,
        str(tmp_path / "program.py"),
        "compare",
        str(study),
        "--out",
        f"late://{store}",
        "--jobs",
        "2",
        "-q",
    ]
    path = f"{Path(studying.__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not list(store.glob("cells/*/*/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cells = {file: file.stat().st_mtime_ns for file in store.glob("cells/*/*/*.json")}
    assert cells
    assert (store / lease.NAME).exists()
    assert not (store / "compare.json").exists()
    another_machine(tmp_path / "second machine", monkeypatch)
    (tmp_path / "kill").touch()
    done = cli("compare", study, "--out", f"late://{store}", "--executor", "dask-local:1", "--table", "csv", "-q")
    assert done.code == 0, done.err
    assert (tmp_path / "killed").exists()
    assert (store / "compare.csv").read_text() == figures
    assert {file: file.stat().st_mtime_ns for file in cells} == cells  # what was there was not measured again
    again = cli("compare", f"late://{store}", "--table", "csv")
    assert (again.code, again.out) == (0, done.out)


@pytest.mark.slow
def test_what_lies_on_a_store_is_looked_at_there(study: Path, tmp_path: Path, cli: Cli) -> None:
    store = f"late://{tmp_path}/store"
    assert cli("compare", study, "--out", store, "-q").code == 0
    shown = cli("compare", store)
    assert f"10 pruned models -> {store}/report.html" in shown.out
    facts = json.loads(cli("info", f"{store}/runs/small-seed0/trajectory", "--json").out)
    local = json.loads(cli("info", tmp_path / "store/runs/small-seed0/trajectory", "--json").out)
    assert facts == {**local, "path": f"{store}/runs/small-seed0/trajectory"}
    for folder in (store, tmp_path / "store"):
        told = json.loads(cli("info", folder, "--json").out)
        assert (told["kind"], told["rows"], told["path"]) == ("study", 10, f"{folder}/compare.json")
    for arguments, said in (
        (("info", f"{store}/runs"), "neither a recording nor a study"),
        (("info", f"{store}/nothing.json"), "no such file"),
        (("compare", f"{store}/runs"), "no study's result"),
        (("compare", store, "--sparsity", "0.5"), "is a study's folder, whose figures are there"),
        (("compare", store, store, "--out", "x"), "read from this machine"),
        (("import", "--model", "prunekit.models:digits_mlp", "--trajectory", store, "--out", "x"), "no trajectory there"),
    ):
        done = cli(*arguments)
        assert done.code in (1, 2), arguments
        assert done.err.count("\n") == 1
        assert said in done.err
    args = json.dumps({"hidden": [8, 8]})
    recorded = f"{store}/runs/small-seed0/trajectory"
    brought = cli(
        "import", "--model", "prunekit.models:digits_mlp", "--model-args", args, "--data", "mine:data", "--trajectory", recorded,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert brought.code == 0, brought.err
    assert Run(tmp_path / "run").trajectory.hash == Trajectory(recorded).hash
