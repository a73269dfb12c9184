"""Pieces through executors: all are done, each once where nothing goes wrong, and again where a worker was killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from prunekit.errors import PrunekitError, UsageError
from prunekit.executors import ALONE, IN_COMPANY, Engine, Piece, check_executor, engine


def noted(folder: Path, number: int, deaths: int = 0) -> int:
    """Notes that it was called, and kills its process the first so many times."""
    calls = len(list(folder.glob(f"{number}-*")))
    (folder / f"{number}-{calls}").touch()
    if calls < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def refused(number: int) -> int:
    raise UsageError(f"{number} is no number")


def failed(number: int) -> int:
    raise ZeroDivisionError("by chance")


def pieces(folder: Path, count: int, deaths: dict[int, int] | None = None) -> list[Piece]:
    deaths = deaths or {}
    return [Piece(f"piece {k}", (k,), noted, (folder, k, deaths.get(k, 0)), k) for k in range(count)]


def results(found: Engine, todo: Iterable[Piece], more: Iterable[Piece] = ()) -> dict[int, Any]:
    """What came back; ``more`` pieces come with the first result."""
    came, later = {}, list(more)

    def done(piece: Piece, result: Any) -> list[Piece]:
        assert piece.about not in came
        came[piece.about] = result
        return [later.pop() for _ in range(len(later))]

    found.drive(todo, done)
    return came


@pytest.mark.parametrize("kind", ["here", "threads", "processes"])
def test_every_piece_once(kind: str, tmp_path: Path) -> None:
    own = ThreadPoolExecutor(3) if kind == "threads" else None
    first, rest = pieces(tmp_path, 9)[:4], pieces(tmp_path, 9)[4:]
    with own or nullcontext(), engine(own, 2 if kind == "processes" else 1) as found:
        assert results(found, first, rest) == {k: k * k for k in range(9)}
        if own is not None:
            assert own.submit(int, "7").result() == 7  # it is its owner's, and stays open
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{k}-0" for k in range(9)]


def test_no_more_at_a_time_than_an_executor_has_room_for() -> None:
    class Counting(ThreadPoolExecutor):
        flying, most = 0, 0

        def submit(self, *arguments: Any, **options: Any) -> Any:
            with lock:
                self.flying += 1
                self.most = max(self.most, self.flying)
            future = super().submit(*arguments, **options)
            future.add_done_callback(lambda _: self.landed())
            return future

        def landed(self) -> None:
            with lock:
                self.flying -= 1

    lock = threading.Lock()
    with Counting(2) as pool, engine(pool) as found:
        found.drive([Piece(str(k), (k,), int, (k,), k) for k in range(30)], lambda piece, result: [])
        assert pool.most <= 4


def test_the_first_in_order_comes_first(tmp_path: Path) -> None:
    with engine() as found:
        came = results(found, [pieces(tmp_path, 4)[k] for k in (2, 0)], [pieces(tmp_path, 4)[k] for k in (3, 1)])
    assert list(came) == [0, 1, 2, 3]


def test_a_pool_that_breaks_while_it_takes_a_piece_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit: Any = ProcessPoolExecutor.submit
    broken: list[ProcessPoolExecutor] = []

    def breaking(self: ProcessPoolExecutor, *arguments: Any) -> Any:
        if broken:
            return submit(self, *arguments)
        broken.append(self)
        self._broken = "a process ended"  # type: ignore[attr-defined]
        raise OSError("handle is closed")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", breaking)
    with engine(jobs=2) as found:
        assert results(found, pieces(tmp_path, 3, {})) == {k: k * k for k in range(3)}
        assert found.executor is not broken[0]


@pytest.mark.slow
def test_what_a_killed_process_had_is_done_again(tmp_path: Path) -> None:
    with engine(jobs=2) as found:
        assert results(found, pieces(tmp_path, 6, {1: 1, 4: 2})) == {k: k * k for k in range(6)}


@pytest.mark.slow
def test_the_piece_that_kills_its_processes_is_named(tmp_path: Path) -> None:
    came: dict[int, Any] = {}

    def done(piece: Piece, result: Any) -> list[Piece]:
        came[piece.about] = result
        return []

    said = r"^piece 1: every worker that took it was killed, .* finished cells are kept"
    with pytest.raises(PrunekitError, match=said), engine(jobs=2) as found:
        found.drive(pieces(tmp_path, 4, {1: 99}), done)
    assert len(list(tmp_path.glob("1-*"))) == IN_COMPANY + ALONE
    assert came.keys() <= {0, 2, 3}


@pytest.mark.exhaustive
def test_dask_does_again_what_a_killed_worker_had_and_names_what_kills(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with engine("dask-local:1") as found:
        assert results(found, pieces(tmp_path / "a", 4, {1: 1})) == {k: k * k for k in range(4)}
        with pytest.raises(UsageError, match=r"^piece: 3 is no number"):
            found.drive([Piece("piece", (0,), refused, (3,))], lambda piece, result: [])
        with pytest.raises(PrunekitError, match=r"^piece 0: every worker that took it was killed"):
            results(found, pieces(tmp_path / "b", 1, {0: 99}))


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_is_named_in_one_line(jobs: int) -> None:
    for function, kind, said in (
        (refused, UsageError, "3 is no number"),
        (failed, PrunekitError, "ZeroDivisionError: by chance"),
    ):
        with pytest.raises(kind, match=f"^a piece: {said}"), engine(jobs=jobs) as found:
            found.drive([Piece("a piece", (0,), function, (3,))], lambda piece, result: [])


def test_what_waits_in_a_pool_of_the_callers_is_given_up_where_a_piece_fails(tmp_path: Path) -> None:
    gone = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        first, second = Piece("first", (0,), refused, (3,)), Piece("second", (1,), gone.wait, (60,))
        with pytest.raises(UsageError, match="3 is no number"), engine(pool) as found:
            found.drive([first, second, *pieces(tmp_path, 9)[2:]], lambda piece, result: [])
        gone.set()
    assert not list(tmp_path.iterdir())


def test_a_pool_of_the_callers_that_broke_is_left_to_its_owner(tmp_path: Path) -> None:
    said = "ProcessPoolExecutor lost its workers at piece 0; finished cells are kept"
    with ProcessPoolExecutor(1) as pool, engine(pool) as found, pytest.raises(PrunekitError, match=said):
        results(found, pieces(tmp_path, 1, {0: 1}))


@pytest.mark.parametrize(
    "spec", ["", "dask", "dask://", "dask://a", "dask://a:99999", "dask-local:0", "dask-local:-1", "dask://a b:1", "slurm:3"]
)
def test_what_names_no_executor_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="give dask://HOST:PORT"):
        check_executor(spec)


@pytest.mark.parametrize("spec", ["dask://head:8786", "dask://10.0.0.1:1", "dask://[::1]:8786", "dask-local:16"])
def test_what_names_one_is_taken(spec: str) -> None:
    pytest.importorskip("distributed")
    check_executor(spec)


def test_processes_and_an_executor_are_not_both_meant() -> None:
    with pytest.raises(UsageError, match="leave it out where --executor is given"), engine("dask-local:1", 2):
        pass


def test_no_scheduler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("prunekit.executors.TIMEOUT", 0.3)
    with (
        pytest.raises(PrunekitError, match=r"^dask://127.0.0.1:9: no scheduler of Dask has answered there in 0.3 s"),
        engine("dask://127.0.0.1:9"),
    ):
        pass
