"""Who works at a place on a store. A store has no lock; a file there that is written again and again says that somebody does.

It is a sign. Two who come within the same moment both take it, until the one who wrote it first looks again; what both write
meanwhile must be whole, whoever wrote it.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from prunekit.errors import ArtifactError, plain
from prunekit.progress import track
from prunekit.remote import Remote

NAME = ".prunekit.lease"
BEAT = 15.0
"""Seconds from one sign of life to the next."""
BEATS = 4
"""How many must be missed by whoever is taken for dead. Only their change is looked at: clocks of two machines may differ."""
MOST = 256


class Lease:
    """Inside, the place counts as this process's, and says so.

    The file says: a word of the local folder's, one of this process's, its machine and number, and a count. Who comes with the
    same local folder, which it has locked, knows that whoever wrote it is gone, and goes on at once. Others look whether the
    count goes on.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        """``folder``: of this machine, locked by this process."""
        self._remote, self._file, self._noted = remote, remote / NAME, folder / NAME
        self._ended = threading.Event()
        self._beats = 0

    def __enter__(self) -> Self:
        noted = self._noted.read_text().split() if self._noted.exists() else []
        word = noted[0] if noted else secrets.token_hex(8)
        self._word = f"{word} {secrets.token_hex(8)} {platform.node().replace(' ', '-')}:{os.getpid()}"
        found = self._read()
        if found and found.split()[0] != word:
            self._watch(found)
        try:
            self._write()
        except ArtifactError:
            if not noted:
                self._noted.unlink()
            raise
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        with suppress(ArtifactError):  # then the next one waits until it counts as dead
            if self._mine():
                self._file.remove()
            self._noted.unlink()

    def check(self) -> None:
        """Looks whether the place still is this process's; call it before something is written there.

        Raises:
            ArtifactError: another one has taken it, or the store cannot be read.
        """
        if not self._mine():
            raise ArtifactError(f"{self._remote}: another prunekit{_who(self._read())} has gone on there; this one ends")

    def _mine(self) -> bool:
        found = self._read()
        return not found or found.startswith(self._word)

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(ArtifactError):  # a store that fails is told of when something is written there
                if self._mine():
                    self._write()

    def _watch(self, found: str) -> None:
        for _ in track(range(BEATS), f"looks whether the prunekit{_who(found)} that was at work there still is", BEATS):
            time.sleep(BEAT)
            now = self._read()
            if not now:
                return
            if now != found:
                raise ArtifactError(
                    f"{self._remote}: another prunekit{_who(now)} is at work there; wait for it, or choose another address"
                )

    def _read(self) -> str:
        return (self._file.beginning(MOST) or b"").decode(errors="replace").strip()

    def _write(self) -> None:
        self._beats += 1
        self._noted.write_text(f"{self._word} {self._beats}\n")
        self._file.put(self._noted)


def _who(text: str) -> str:
    words = text.split()
    return f" (on {plain(words[2])})" if len(words) > 2 else ""
