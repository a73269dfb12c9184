"""Several processes at one work, as ``torchrun`` starts them: who this one is, its share, and sums over all.

Every rank runs the whole verb on the same input; what is a sum over samples is dealt out (``dealt``) and added up (``add_up``),
so that all go on with the same bits. What a rank finds for itself – a clock, a measured time – comes from the first one
(``from_first``). Only the first rank writes files (``prunekit.durable``) and talks; a program that ``torchrun`` did not start is
one rank alone, for which all of this does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from prunekit.errors import PrunekitError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_apart: ContextVar[bool] = ContextVar("_apart", default=False)
_joined = False
BUCKET = 2**22
"""Numbers that are added up in one call: 32 MiB in float64."""


def asked() -> bool:
    """Whether ``torchrun`` started this process beside others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` started work as one; gloo between CPUs, nccl between GPUs.

    Raises:
        UsageError: the variables that torchrun sets make no sense.
    """
    global _joined
    import torch
    import torch.distributed as dist

    if dist.is_initialized():  # by whoever calls from Python
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the {os.environ['WORLD_SIZE']} processes did not find each other; start them with torchrun") from error
    _joined = True
    yield
    dist.destroy_process_group()  # not after an error: whoever waits for this one must be ended, not answered


def size() -> int:
    """How many ranks work together; 1 of a process alone."""
    return _group().get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _group().get_rank() if _together() else 0


def first() -> bool:
    """Whether this one writes and talks."""
    return rank() == 0


def _together() -> bool:
    module = sys.modules.get("torch.distributed")
    return _joined and not _apart.get() and module is not None and module.is_initialized()


def _group() -> Any:
    return sys.modules["torch.distributed"]


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


def stretch(count: int) -> range:
    """Which of ``count`` rows in order are this rank's; the first ranks have one more where they do not divide.

    Example:
        >>> from prunekit.ranks import stretch
        >>> stretch(5)
        range(0, 5)
    """
    each, more = divmod(count, size())
    begin = rank() * each + min(rank(), more)
    return range(begin, begin + each + (rank() < more))


def add_up(tensors: Iterable[Tensor]) -> None:
    """Adds up every tensor over all ranks, in place, in float64; all have the same bits then.

    All ranks must give tensors of the same shapes in the same order.
    """
    if size() == 1:
        return
    import torch

    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and (waiting[0].device != tensor.device or sum(t.numel() for t in waiting) + tensor.numel() > BUCKET):
            _added(waiting, torch.float64)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _added(waiting, torch.float64)


def average(tensors: Iterable[Tensor], weight: float = 1.0) -> None:
    """Weighted mean of every tensor over all ranks, in place, in the tensors' own precision: gradients of a step.

    Args:
        weight: what this rank's tensors count, its number of samples for instance.
    """
    if size() == 1:
        return
    import torch

    every = list(tensors)
    whole = torch.tensor([weight], dtype=torch.float64)
    add_up([whole])
    for tensor in every:
        tensor.mul_(weight / float(whole))
    waiting: list[Tensor] = []
    for tensor in every:
        if waiting and (
            (waiting[0].device, waiting[0].dtype) != (tensor.device, tensor.dtype)
            or sum(t.numel() for t in waiting) + tensor.numel() > BUCKET
        ):
            _added(waiting, waiting[0].dtype)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _added(waiting, waiting[0].dtype)


def _added(tensors: list[Tensor], dtype: Any) -> None:
    import torch

    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    _group().all_reduce(flat)
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


def adding(tensor: Tensor) -> Any:
    """Begins to add up a tensor over all ranks, in place and in its own precision; it is done when ``wait()`` of this returns."""
    return _group().all_reduce(tensor, async_op=True)


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


def gathered(value: Any) -> list[Any]:
    """What every rank gives, in the order of ranks, as JSON carries it."""
    if size() == 1:
        return [value]
    return [json.loads(text) for text in _texts(json.dumps(value))]


def from_first(make: Callable[[], T]) -> T:
    """What ``make()`` gives on the first rank, as JSON carries it; the others do not call it."""
    if size() == 1:
        return make()
    found: T = json.loads(_texts(json.dumps(make()) if first() else "null")[0])
    return found


def _texts(text: str) -> list[str]:
    """Every rank's text, without a pickle in between."""
    import torch

    group = _group()
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    group.all_gather(lengths, torch.tensor([len(content)]))
    longest = int(max(int(length) for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(content)] = content
    found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
    group.all_gather(found, padded)
    return [bytes(part[: int(length)].tolist()).decode() for part, length in zip(found, lengths, strict=True)]


def wait() -> None:
    """Until all ranks are here."""
    if size() > 1:
        import torch

        _group().all_reduce(torch.zeros(1))  # a barrier would take a GPU where there is one


def tells(code: int) -> bool:
    """Whether this rank is the one that says why the work ends: the first that fails; the others end because of it."""
    if not _joined:  # before they met, all see the same
        return not asked() or os.environ["RANK"] == "0"
    try:
        store = _group().distributed_c10d._get_default_store()
        said: bytes = store.compare_set("prunekit/failed", "", f"{rank()} {code}")
        return said.decode().split()[0] == str(rank())
    except (RuntimeError, ValueError):  # the others are gone, and have said why
        return False
