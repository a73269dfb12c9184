"""Processes that train one model, as its recording sees them: what each of them notes is told to all, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch

from prunekit import ranks
from prunekit.errors import ArtifactError, PrunekitError, UsageError

MEETING = timedelta(minutes=5)
"""How long the first processes wait until all have begun to record."""
ROOM = 4096
"""Bytes that every process gives at first; what is longer takes a second round, and more room from then on."""

_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_meetings = 0


class Together:
    """The processes of torch.distributed's default group; a process alone where there is none.

    Messages go through a gloo group of their own: also where gradients go by nccl, and never as pickles.

    Attributes:
        rank, size: which of them this is, and how many there are.
    """

    def __init__(self, alone: bool | None) -> None:
        found = sys.modules.get("torch.distributed")
        alone = ranks.met() is not None if alone is None else alone  # a verb's ranks each record what they do for themselves
        group: Any = found if not alone and found is not None and found.is_available() and found.is_initialized() else None
        self.rank: int = group.get_rank() if group else 0
        self.size: int = group.get_world_size() if group else 1
        self._room = ROOM
        self._group = _met(self.rank, self.size) if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that talks."""
        return self.rank == 0

    def exchange(self, make: Callable[[], Any]) -> list[Any]:
        """What ``make()`` gives in every process, in their order; called by all of them.

        Where it raises in one, all raise; the others name the process and what went wrong there.

        Raises:
            PrunekitError: this process's own failure.
            ArtifactError: another's, or another process has ended.
        """
        if self.size == 1:
            return [make()]
        if self._group is None:
            raise ArtifactError("Recorder: recording has ended by an error, here or in another process")
        failure: PrunekitError | None = None
        mine: dict[str, Any] = {}
        try:
            mine["value"] = make()
        except PrunekitError as error:
            failure, mine["failure"] = error, str(error)
        found = [json.loads(text) for text in self._texts(json.dumps(mine))]
        if failure is not None:
            raise failure
        for rank, one in enumerate(found):
            if "failure" in one:
                raise ArtifactError(f"process {rank} of {self.size}: {one['failure']}")
        return [one["value"] for one in found]

    def leave(self) -> None:
        """Ends the messages after an error: whoever waits for this process's finds out at once."""
        if self._group is not None:
            for default, group in list(_groups.items()):
                if group is self._group:
                    del _groups[default]
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def _texts(self, text: str) -> list[str]:
        content = text.encode()
        room = self._room
        given = self._gathered(len(content).to_bytes(8, "little") + content[: room - 8], room)
        lengths = [int.from_bytes(one[:8], "little") for one in given]
        if max(lengths) + 8 > room:
            self._room = 1 << (max(lengths) + 8 - 1).bit_length()
            given = self._gathered(bytes(8) + content, self._room)
        return [one[8 : 8 + length].decode() for one, length in zip(given, lengths, strict=True)]

    def _gathered(self, content: bytes, room: int) -> list[bytes]:
        mine = torch.frombuffer(bytearray(content.ljust(room, b"\0")), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            torch.distributed.all_gather(every, mine, group=self._group)
        except RuntimeError:
            raise ArtifactError(
                f"Recorder: another of the {self.size} processes that train has ended or does not answer; see what it said. "
                "The steps so far can be read"
            ) from None
        return [one.numpy().tobytes() for one in every]


def _met(rank: int, size: int) -> Any:
    """The group that messages go through, once every process is here.

    Raises:
        UsageError: some did not come.
    """
    global _meetings
    store = torch.distributed.distributed_c10d._get_default_store()
    keys = [f"prunekit/recorder/{_meetings}/{one}" for one in range(size)]
    _meetings += 1
    store.set(keys[rank], "here")
    try:
        store.wait(keys, MEETING)
    except RuntimeError:
        missing = [one for one in range(size) if not store.check([keys[one]])]
        raise UsageError(
            f"Recorder: {size} processes train, and {_listed(missing)} made no Recorder within {MEETING.total_seconds():.0f} s; "
            "make one in each of them, with the same folder. A training of its own in one process takes alone=True"
        ) from None
    default = torch.distributed.distributed_c10d._get_default_group()
    if default not in _groups:
        _groups[default] = torch.distributed.new_group(backend="gloo")
    return _groups[default]


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (" …" if len(ranks) > 4 else "")
    return f"process{'es' if len(ranks) > 1 else ''} {shown}"
