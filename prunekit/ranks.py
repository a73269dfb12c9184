"""Several processes at one work, as ``torchrun`` starts them: who this one is, its share, and sums over all.

Every rank runs the whole verb on the same input; what is a sum over samples is dealt out (``dealt``, ``stretch``) and added up
(``add_up``), rows are put together again (``rows``), so that all go on with the same bits. What a rank finds for itself, such as
a measured time, comes from the first one (``from_first``). Only the first rank writes files (``prunekit.durable``) and talks; a
program that did not call ``joined`` is one rank alone, for which all of this does nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from prunekit.errors import PrunekitError, UsageError, quoted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""A rank that the others wait for longer hangs; they end then."""
BUCKET = 2**22
"""Numbers that are added up in one call: 32 MiB in float64."""
CARRIED = re.compile(r"gloo|nccl|connection (closed|reset)|process ?group", re.IGNORECASE)
"""What errors of collectives speak of."""
FAILED, AT_ONCE = "prunekit/failed", 0.5
"""Where the rank that says why the work ends is noted, and for how many seconds others leave that to the first, which may fail
like them."""


class Team(NamedTuple):
    """The ranks that work together, and which of them this is; ``store`` is where they tell of failures."""

    group: Any
    rank: int
    size: int
    store: Any


_apart: ContextVar[bool] = ContextVar("_apart", default=False)
_team: Team | None = None
_met: Team | None = None
"""The team, also after the work has failed."""
_unmet = False
"""Whether this process has not found the others, which may be its fault alone."""
_groups: dict[Any, Any] = {}
"""Every process group that was worked in, by the one that the program had; a store where ranks met once takes no second time."""


def asked() -> bool:
    """Whether ``torchrun`` started this process beside others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` started work as one; gloo between CPUs, nccl between GPUs.

    All of them must call the same things in the same order. Where the program has initialised a process group, a group of ours
    is made beside it, of the same processes; else one is initialised, for as long as the program runs. A process alone stays
    alone.

    Raises:
        UsageError: the variables that torchrun sets make no sense.

    Example:
        >>> from prunekit import ranks
        >>> with ranks.joined():
        ...     ranks.size()
        1
    """
    global _team, _met, _unmet
    import torch
    import torch.distributed as dist

    theirs = dist.group.WORLD
    if _team is not None or (theirs is None and not asked()):
        yield
        return
    if theirs is None:
        _check_environment()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        if theirs is None:
            dist.init_process_group(backend, timeout=TIMEOUT)
            atexit.register(_leave)
            _groups[dist.group.WORLD] = dist.group.WORLD
        elif theirs not in _groups:
            _groups[theirs] = dist.new_group(backend=backend, timeout=TIMEOUT)
        group = _groups[dist.group.WORLD]
    except (ValueError, RuntimeError) as error:
        _unmet = True
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise PrunekitError(f"the processes did not find each other at {where} ({quoted(error, 120)})") from error
    _met = _team = Team(group, dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store())
    try:
        yield
    finally:
        _team = None
    _met = None


def _leave() -> None:
    """Ends the threads of the group that was initialised here, which must not outlive the interpreter."""
    global _met
    _met = None
    _groups.clear()
    if _group().is_initialized():
        _group().destroy_process_group()


def _check_environment() -> None:
    """Raises UsageError for variables that torchrun would not set so."""
    global _unmet
    _unmet = True
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        given = os.environ.get(name, "")
        if not given or (name != "MASTER_ADDR" and not given.isdecimal()):
            raise UsageError(
                f"RANK and WORLD_SIZE are set, as torchrun sets them for each process, and {name} is {given[:40]!r}; "
                "start them with torchrun, or one process without these variables"
            )
        numbers[name] = given
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise UsageError(f"RANK is {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']}; start the processes with torchrun")
    _unmet = False


def size() -> int:
    """How many ranks work together; 1 of a process alone."""
    return 1 if _team is None or _apart.get() else _team.size


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _team is None or _apart.get() else _team.rank


def first() -> bool:
    """Whether this one writes and talks."""
    return rank() == 0


def _group() -> Any:
    """What a team's collectives are called of; ``group`` is the team's."""
    return sys.modules["torch.distributed"]


@contextmanager
def _together() -> Iterator[Any]:
    """The team's group, for a collective.

    Raises:
        PrunekitError: another rank has ended, or does not answer.
    """
    assert _team is not None
    try:
        yield _team.group
    except RuntimeError as error:  # in words of the library that carries it
        _lost(error)


def _lost(error: RuntimeError) -> NoReturn:
    assert _team is not None
    text = str(error).lower()
    if "timed out" in text or "timeout" in text:
        minutes = TIMEOUT.total_seconds() / 60
        raise PrunekitError(
            f"another of the {_team.size} processes has not answered for {minutes:g} minutes: it hangs, or does what the others "
            "do not"
        ) from error
    raise PrunekitError(
        f"another of the {_team.size} processes has ended without a word (killed, or out of memory?); nothing more is written"
    ) from error


@contextmanager
def carrying() -> Iterator[Any]:
    """The team's group, for a library that calls collectives of its own inside; of their errors it is said as of ours.

    Raises:
        PrunekitError: another rank has ended, or does not answer.
    """
    try:
        yield None if _team is None else _team.group
    except RuntimeError as error:
        if size() > 1 and CARRIED.search(str(error)):
            _lost(error)
        raise


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process is alone: it waits for nobody, and writes files of its own."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def dealt(items: Sequence[T]) -> Sequence[T]:
    """The items that are this rank's: every ``size()``-th.

    Example:
        >>> from prunekit.ranks import dealt
        >>> dealt([3, 4, 5])
        [3, 4, 5]
    """
    return items[rank() :: size()]


def stretch(count: int, of: int | None = None) -> range:
    """Which of ``count`` rows in order are this rank's, or another's; the first ranks have one more where they do not divide.

    Example:
        >>> from prunekit.ranks import stretch
        >>> stretch(5)
        range(0, 5)
    """
    each, more = divmod(count, size())
    mine = rank() if of is None else of
    begin = mine * each + min(mine, more)
    return range(begin, begin + each + (mine < more))


def add_up(tensors: Iterable[Tensor]) -> None:
    """Adds up every tensor over all ranks, in place, in float64; all have the same bits then.

    All ranks must give tensors of the same shapes in the same order.
    """
    if size() == 1:
        return

    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and (waiting[0].device != tensor.device or sum(t.numel() for t in waiting) + tensor.numel() > BUCKET):
            _added(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _added(waiting)


def _added(tensors: list[Tensor]) -> None:
    import torch

    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    with _together() as group:
        _group().all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def total(value: float) -> float:
    """The sum of every rank's number, the same bits on all."""
    if size() == 1:
        return value
    import torch

    found = torch.tensor([value], dtype=torch.float64)
    add_up([found])
    return float(found)


def adding(tensor: Tensor) -> Adding:
    """Begins to add up a tensor over all ranks, in place and in its own precision; it is done when ``wait()`` of this returns."""
    with _together() as group:
        return Adding(_group().all_reduce(tensor, async_op=True, group=group))


class Adding(NamedTuple):
    """What ``adding`` has begun."""

    work: Any

    def wait(self) -> None:
        """Until it is done."""
        with _together():
            self.work.wait()


def alike(what: str, tensor: Tensor) -> None:
    """Makes sure that all ranks hold the same, by a checksum.

    Raises:
        PrunekitError: they do not, which says ``what`` and on which ranks.
    """
    if size() == 1:
        return
    import torch

    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    sums = gathered(zlib.crc32(content))
    if other := [str(number) for number, found in enumerate(sums) if found != sums[0]]:
        raise PrunekitError(
            f"{what}: rank {', '.join(other)} found something else than rank 0; start all ranks on machines of one kind, with "
            "the same versions and number of threads"
        )


def same(tensors: Mapping[str, Tensor], of: int = 0) -> dict[str, Tensor]:
    """The first rank's tensors, or another's; all must have some of the same shapes, types and names."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.detach()
        if size() > 1:
            found[name] = found[name].new_empty(tensor.shape).copy_(tensor.detach())
            with _together() as group:
                _group().broadcast(found[name], of, group=group)
    return found


def rows(own: Tensor) -> Tensor:
    """The rows ``(rows, ...)`` of all ranks in their order; a rank may have none, of the same shape but for that."""
    if size() == 1:
        return own
    import torch

    counts = gathered(len(own))
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own.detach()
    found = [torch.empty_like(padded) for _ in counts]
    with _together() as group:
        _group().all_gather(found, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def gathered(value: Any) -> list[Any]:
    """What every rank gives, in the order of ranks, as JSON carries it."""
    if size() == 1:
        return [value]
    return [json.loads(text) for text in _texts(json.dumps(value))]


def from_first(make: Callable[[], T]) -> T:
    """What ``make()`` gives on the first rank, as JSON carries it; the others wait, and do not call it.

    Inside, the first rank is alone.
    """
    if size() == 1:
        return make()
    text = "null"
    if first():
        with apart():
            text = json.dumps(make())
    found: T = json.loads(_texts(text)[0])
    return found


def _texts(text: str) -> list[str]:
    """Every rank's text, without a pickle in between."""
    import torch

    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    with _together() as group:
        _group().all_gather(lengths, torch.tensor([len(content)]), group=group)
        longest = int(max(int(length) for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
        _group().all_gather(found, padded, group=group)
    return [bytes(part[: int(length)].tolist()).decode() for part, length in zip(found, lengths, strict=True)]


def wait() -> None:
    """Until all ranks are here."""
    if size() > 1:
        import torch

        with _together() as group:
            _group().all_reduce(torch.zeros(1), group=group)  # a barrier would take a GPU where there is one


def met() -> Team | None:
    """The ranks that were joined, also after their work has failed; None of a process alone."""
    return _met


def tells(code: int) -> bool:
    """Whether this rank is the one that says why the work ends: the first that fails; the others end because of it.

    Where all fail alike, that is rank 0.
    """
    if _met is None:  # before they met, all see the same
        return not asked() or _unmet or os.environ["RANK"] == "0"
    mine = f"{_met.rank} {code}"
    try:
        end = time.monotonic() + AT_ONCE
        while _met.rank and time.monotonic() < end and not _met.store.check([FAILED]):
            time.sleep(AT_ONCE / 20)
        said: bytes = _met.store.compare_set(FAILED, "", mine)
        return said.decode() == mine
    except (RuntimeError, ValueError):  # the store went with the rank that held it
        return True
