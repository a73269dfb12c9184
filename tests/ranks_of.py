"""Several ranks of one program, as torchrun starts them, without the seconds that torchrun and imports take."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

from benchmarks.zoo.operators import declare

CLI = "prunekit"
"""The module that is the command line."""
IMPORTED = ["torch.distributed", "torch._dynamo", "torch.onnx", "prunekit.cli", "tests.on_ranks"]
"""What a server imports once, from which ranks are forked; it computes nothing itself. Some of it torch imports only when it is
used, which each rank would do for itself."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Ranks:
    """``count`` processes of ``python -m module *arguments``; each has its rank in its environment, and its own output.

    The store where they meet is this process's, as with torchrun it is the agent's, and outlives them.
    """

    def __init__(self, count: int, module: str, *arguments: object, seconds: float | None = None) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(IMPORTED)
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0", "PRUNEKIT_STATE": os.environ["PRUNEKIT_STATE"],
            }  # fmt: skip
            call = (environment, module, [str(argument) for argument in arguments], self._told(rank), seconds)
            self.processes.append(server.Process(target=_rank, args=call))
            self.processes[-1].start()

    def _told(self, rank: int) -> str:
        return str(Path(self._folder.name) / str(rank))

    def meet(self, seconds: float = 60) -> None:
        """Until all have told the store where they are; who is killed before is waited for until torchrun's agent ends all."""
        end = time.monotonic() + seconds
        while self._store.num_keys() <= len(self.processes) and time.monotonic() < end:
            time.sleep(0.01)

    def done(self, seconds: float = 120) -> list[Done]:
        """What every rank came to; kills those that have not ended after so long, whose code is -9."""
        found = []
        for process in self.processes:
            process.join(seconds)
        for rank, process in enumerate(self.processes):
            process.kill()
            process.join()
            texts = [Path(f"{self._told(rank)}.{stream}").read_text() for stream in ("out", "err")]
            found.append(Done(process.exitcode or 0, *texts))
        self._folder.cleanup()
        return found


def _rank(environment: Mapping[str, str], module: str, arguments: list[str], told: str, seconds: float | None) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored by whatever a shell starts in the background
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(f"{told}.{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    declare()  # as other tests do where torchvision's operators cannot be loaded
    sys.argv = [module, *arguments]
    if seconds is not None:
        from prunekit import ranks

        ranks.TIMEOUT = timedelta(seconds=seconds)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
