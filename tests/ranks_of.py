"""Several ranks of one program, started as torchrun starts them, without the seconds that torchrun itself takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, NamedTuple

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Ranks:
    """``count`` processes of ``python *arguments``; each has its rank in its environment, and its own output.

    The store where they meet is this process's, as with torchrun it is the agent's, and outlives them.
    """

    def __init__(self, count: int, arguments: Sequence[object], cwd: Path | None = None, **environment: str) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._files: list[tuple[IO[str], IO[str]]] = []
        self.processes = []
        for rank in range(count):
            mine = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 – they outlive this call
            self._files.append((out, err))
            command = [sys.executable, *map(str, arguments)]
            self.processes.append(
                subprocess.Popen(command, env=os.environ | mine | environment, stdout=out, stderr=err, cwd=cwd or ROOT)
            )

    def done(self, seconds: float = 120) -> list[Done]:
        """What every rank came to; kills those that have not ended after so long."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        found = []
        for code, (out, err) in zip(codes, self._files, strict=True):
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
                file.close()
            found.append(Done(code, *texts))
        return found
