"""Temporary folders: inside one of the process's own, which goes with it; of killed processes they go with the next one."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

from prunekit import stopping

PREFIX, SUFFIX = "prunekit-", ".tmp"
NAME = re.compile(r"prunekit-\w+\.tmp")


def folder(prefix: str = PREFIX, suffix: str = "") -> tempfile.TemporaryDirectory[str]:
    """A new folder, removed by ``cleanup``, with this object, or with the process.

    Example:
        >>> from pathlib import Path
        >>> from prunekit import temporary
        >>> with temporary.folder() as place:
        ...     Path(place, "notes").write_text("gone soon")
        9
        >>> Path(place).exists()
        False
    """
    return tempfile.TemporaryDirectory(prefix=prefix, suffix=suffix, dir=root())


def root() -> Path:
    """The folder of this process's own."""
    return _root(tempfile.gettempdir(), os.getpid())


@cache
def _root(place: str, owner: int) -> Path:
    """Locked for as long as its owner lives, so that it can be told from one that was left."""
    _sweep(place)
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=place))
        if _held(path) is not None:  # else somebody took it for one that was left
            break

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    Finalize(None, remove, exitpriority=-100)  # after its children have ended, and in one of multiprocessing's as well
    stopping.before_the_end(remove)
    return path


def _held(path: Path) -> int | None:
    """A handle that holds the folder; None where somebody else does, or it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False)):
            return handle
    os.close(handle)
    return None


def _sweep(place: str) -> None:
    """Removes what killed processes of this user's have left there."""
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if NAME.fullmatch(entry.name) is None or entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            if (handle := _held(Path(entry.path))) is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(handle)
