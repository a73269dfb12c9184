"""Independent pieces of work through any ``concurrent.futures.Executor``: here, in processes, or on the workers of Dask.

A bounded number of pieces is under way at a time. Pieces whose workers were lost are done again. A pool of processes breaks as a
whole when one is killed, so a piece that was there twice is then done alone: the piece that kills its workers can be named.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from prunekit import stopping, temporary
from prunekit.errors import Note, PrunekitError, UsageError, quoted
from prunekit.imports import needed

IN_COMPANY, ALONE = 2, 2
"""How often a piece may be among those that lost their workers, before it is tried alone; and how often it may lose one then."""
STARTS = 3
"""How often workers of Dask on this machine are started, where one of them is killed before all of them stand."""
MOST = 64
"""Pieces under way at a time where an executor does not say how many workers it has."""
TIMEOUT = 15
"""Seconds in which a scheduler of Dask answers."""
SPEC = re.compile(r"dask://([A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}|dask-local:[1-9][0-9]{0,3}")


@dataclass(frozen=True)
class Piece:
    """A call that depends on no other piece under way.

    Attributes:
        name: for messages.
        order: smaller ones are done first.
        function: of a module that the workers can import.
        arguments: what travels to the worker.
        about: stays here, for whoever takes the result.
    """

    name: str
    order: tuple[int, ...]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    about: Any = None


@dataclass
class Engine:
    """An executor, and what can be known of it.

    Attributes:
        executor: what pieces are submitted to.
        most: how many may be under way at a time.
        told: what it is, in words.
        renew: makes a new executor where this one's workers were lost; None where only its owner can.
    """

    executor: Executor
    most: int
    told: str
    renew: Callable[[], Executor] | None = None
    _lost: dict[str, int] = field(default_factory=dict)
    _alone: dict[str, int] = field(default_factory=dict)

    def drive(self, pieces: Iterable[Piece], done: Callable[[Piece, Any], Iterable[Piece]]) -> None:
        """Does all pieces, and those that ``done``, which is called with every result, gives in addition.

        Raises:
            PrunekitError: what the first piece that failed says; or its workers were killed again and again.
        """
        counter = itertools.count()
        ready = [(piece.order, next(counter), piece) for piece in pieces]
        heapq.heapify(ready)
        flying: dict[Future[Any], Piece] = {}
        try:
            self._drive(ready, flying, done, counter)
        except BaseException:
            for future in flying:
                future.cancel()  # an executor of the caller's stays open, and would go on with them
            raise

    def _drive(
        self,
        ready: list[tuple[tuple[int, ...], int, Piece]],
        flying: dict[Future[Any], Piece],
        done: Callable[[Piece, Any], Iterable[Piece]],
        counter: Iterator[int],
    ) -> None:
        while ready or flying:
            while ready and self._may_fly(ready[0][2], flying.values()):
                piece = heapq.heappop(ready)[2]
                flying[self._submit(piece)] = piece
            finished = wait(flying, return_when=FIRST_COMPLETED).done
            broken = any(isinstance(self._failure(future), BrokenExecutor) for future in finished)
            if broken:
                finished = wait(flying).done  # all have ended with it, some of them well
            lost = []
            for future in finished:
                piece = flying.pop(future)
                if isinstance(self._failure(future), BrokenExecutor):
                    lost.append(piece)
                    continue
                for more in done(piece, self._result(piece, future)):
                    heapq.heappush(ready, (more.order, next(counter), more))
            if broken:
                self._again(lost)
            for piece in lost:
                heapq.heappush(ready, (piece.order, next(counter), piece))

    def _may_fly(self, piece: Piece, flying: Iterable[Piece]) -> bool:
        """Whether a piece may be submitted now: one that may be what kills workers flies alone."""
        others = list(flying)
        suspect = any(self._lost.get(each.name, 0) >= IN_COMPANY for each in (piece, *others))
        return not others if suspect else len(others) < self.most

    def _submit(self, piece: Piece) -> Future[Any]:
        try:
            return self.executor.submit(piece.function, *piece.arguments)
        except BrokenExecutor as error:
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    @staticmethod
    def _failure(future: Future[Any]) -> BaseException | None:
        try:
            return future.exception()
        except CancelledError as error:
            return error

    def _result(self, piece: Piece, future: Future[Any]) -> Any:
        error = self._failure(future)
        if error is None:
            return future.result()
        kept = "finished cells are kept, start it again"
        if isinstance(error, CancelledError):
            raise PrunekitError(f"{self.told} has gone away while it worked at {piece.name}; {kept}") from None
        if type(error).__name__ == "KilledWorker":  # Dask's, which has tried again itself
            raise PrunekitError(_given_up(piece)) from None
        if isinstance(error, PrunekitError):
            raise type(error)(f"{piece.name}: {error}") from error
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "prunekit":
            raise UsageError(f"the workers of {self.told} cannot import prunekit; install it there, of this version") from None
        if isinstance(error, MemoryError):
            raise PrunekitError(f"{piece.name}: not enough memory for this; {kept}") from None
        raise PrunekitError(f"{piece.name}: {quoted(error)}") from error

    def _again(self, lost: list[Piece]) -> None:
        """New workers for pieces that lost theirs."""
        if self.renew is None:
            raise PrunekitError(f"{self.told} lost its workers at {lost[0].name}; finished cells are kept, start it again")
        for piece in lost:
            if self._lost.get(piece.name, 0) >= IN_COMPANY:
                self._alone[piece.name] = self._alone.get(piece.name, 0) + 1
            self._lost[piece.name] = self._lost.get(piece.name, 0) + 1
            if self._alone.get(piece.name, 0) >= ALONE:
                raise PrunekitError(_given_up(piece))
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.executor = self.renew()


def _given_up(piece: Piece) -> str:
    return (
        f"{piece.name}: every worker that took it was killed, for want of memory perhaps; finished cells are kept, start it "
        "again with fewer workers"
    )


def check_executor(spec: str) -> None:
    """Refuses what names no executor, or one whose package is not installed.

    Raises:
        UsageError: says what can be given.
    """
    found = SPEC.fullmatch(spec)
    if found is None or int(spec.rpartition(":")[2]) > 65535:
        raise UsageError(f"--executor is {spec!r}; give dask://HOST:PORT, a scheduler's address, or dask-local:WORKERS")
    needed("distributed")


@contextmanager
def engine(executor: str | Executor | None = None, jobs: int = 1) -> Iterator[Engine]:
    """An engine that is put away in the end; whatever it still works at then is given up.

    Args:
        executor: ``dask://HOST:PORT``, ``dask-local:WORKERS``, or any executor of the caller's, which stays open; None for
            this machine.
        jobs: how many processes of this machine then; 1 for none but this one.

    Raises:
        UsageError: see ``check_executor``; or both are given.
        PrunekitError: no scheduler answers.
    """
    if executor is not None and jobs != 1:
        raise UsageError("--jobs counts processes of this machine; leave it out where --executor is given")
    if isinstance(executor, Executor):
        yield Engine(executor, _most(executor), type(executor).__name__)
    elif executor is not None:
        check_executor(executor)
        with _dask(executor) as found:
            yield found
    elif jobs == 1:
        yield Engine(_Here(), 1, "this process")
    else:
        with _processes(jobs) as found:
            yield found


def _most(executor: Executor) -> int:
    workers = getattr(executor, "_max_workers", None)
    return workers + 2 if isinstance(workers, int) else MOST


class _Here(Executor):
    """This process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # told of as that of any worker
            future.set_exception(error)
        return future


class _Processes(ProcessPoolExecutor):
    """Processes of this machine, started when work is there."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with _interrupts_held():
            try:
                return super().submit(fn, *args, **kwargs)
            except OSError as error:  # its queues are closed while it starts a process for this
                if self._broken:
                    raise BrokenExecutor("a process ended while another was started") from error
                raise


@contextmanager
def _processes(count: int) -> Iterator[Engine]:
    place = temporary.root()

    def made() -> Executor:
        return _Processes(count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(str(place),))

    found = Engine(made(), count + 2, f"{count} processes", made)
    try:
        yield found
    except BaseException:
        workers = list((getattr(found.executor, "_processes", None) or {}).values())
        found.executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()  # what it writes is written whole or not at all
        for worker in workers:
            worker.join()
        raise
    found.executor.shutdown()


def _begin(place: str) -> None:
    """A worker ends with its parent, however that ends, leaves stdout to it, and has its temporary files in ``place``."""
    stopping.end_with_parent()
    sys.stdout = sys.stderr
    os.environ["TMPDIR"] = tempfile.tempdir = place


@contextmanager
def _dask(spec: str) -> Iterator[Engine]:
    distributed: Any = needed("distributed")
    debug = bool(os.environ.get("PRUNEKIT_DEBUG"))
    if not debug:
        for name in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what matters is said in our own words
    with (
        _local(spec, debug) if spec.startswith("dask-local:") else nullcontext("tcp://" + spec.removeprefix("dask://")) as address
    ):
        try:
            client = distributed.Client(address, timeout=TIMEOUT, set_as_default=False)
        except (OSError, ValueError):
            raise PrunekitError(
                f"{spec}: no scheduler of Dask has answered there in {TIMEOUT:g} s; start one with: dask scheduler"
            ) from None
        try:
            known = len(client.nthreads())
            if not known:
                warnings.warn(Note(f"{spec}: has no workers yet; cells wait for them"), stacklevel=2)
            yield Engine(client.get_executor(pure=False), max(MOST, 2 * known), spec)
        finally:
            with _interrupts_held():
                client.close()


@contextmanager
def _local(spec: str, debug: bool) -> Iterator[str]:
    """Workers of Dask on this machine; yields their scheduler's address.

    Raises:
        PrunekitError: they were killed again and again before all of them stood.
    """
    dask: Any = needed("dask")
    distributed: Any = needed("distributed")
    place = str(temporary.root())  # others cannot write there, and Dask puts it on Python's path
    patient = {"temporary-directory": place, "distributed.deploy.lost-worker-timeout": "1 day"}  # else it gives up slow restarts
    with dask.config.set(patient):
        for left in reversed(range(STARTS)):
            try:
                with _interrupts_held():
                    cluster = distributed.LocalCluster(
                        n_workers=int(spec.removeprefix("dask-local:")), threads_per_worker=1, processes=True,
                        dashboard_address=None, silence_logs=False if debug else logging.CRITICAL + 1, local_directory=place,
                        env={"TMPDIR": place},
                    )  # fmt: skip
                break
            except RuntimeError as error:
                if not left:
                    raise PrunekitError(
                        f"{spec}: its workers were started {STARTS} times, and one ended at once each time, for want of memory "
                        f"perhaps ({quoted(error)}); take fewer workers"
                    ) from error
        try:
            yield cluster.scheduler_address
        finally:
            with _interrupts_held():
                cluster.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C comes afterwards; processes that are started inside never hear of it, from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
