"""Files behind fsspec: object stores, HTTP, archives, memory. What is read there is read as a local file is, within bounds.

A store has no rename: files are written whole, and the one that tells of the others comes last. Readers look at that one first.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from prunekit.errors import ArtifactError, UsageError, plain, quoted
from prunekit.progress import track

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(::[A-Za-z][A-Za-z0-9+.\-]*)*://")
"""How an address begins: ``s3://``, ``memory://``, ``simplecache::s3://``."""
SHORTENED = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")
TOGETHER = 16
"""Files that are asked for at a time."""


class _Stream(io.RawIOBase):
    """A file of fsspec's; whatever its store raises when it is read becomes an OSError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # of the store's own package
            raise OSError(quoted(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class Remote:
    """A file or folder behind fsspec, with as much of ``pathlib.Path`` as readers use.

    Attributes:
        url: its address, ``s3://bucket/folder``.

    Raises:
        UsageError: fsspec, or the package that its protocol needs, is not installed, or takes no such address.
    """

    url: str

    @cached_property
    def _found(self) -> tuple[Any, str]:
        import fsspec

        try:
            fs, path = fsspec.url_to_fs(self.url)
        except Exception as error:  # of whichever package the protocol belongs to
            raise UsageError(f"{self}: {quoted(error)}") from None
        return fs, path

    def __str__(self) -> str:
        return plain(self.url)

    def __truediv__(self, name: str | PurePosixPath) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def exists(self) -> bool:
        with self._told():
            return bool(self._found[0].exists(self._found[1]))

    def size(self) -> int:
        """Bytes of the file.

        Raises:
            ArtifactError: there is none, or the store cannot be reached.
        """
        with self._told():
            fs, path = self._found
            return int(fs.size(path)) if fs.isfile(path) else self._lacking()

    def _lacking(self) -> int:
        raise FileNotFoundError

    def open(self) -> BinaryIO:
        """The file, to read bytes from, at whatever place of it; what is read next is fetched with what is read."""
        with self._told():
            fs, path = self._found
            return io.BufferedReader(_Stream(fs.open(path, "rb")))

    def put(self, local: Path) -> None:
        """Writes a local file's bytes here; a store shows them when all have come."""
        with self._told("written"):
            fs, path = self._found
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.put_file(str(local), path)

    def get(self, local: Path) -> None:
        """Writes the file's bytes into a local one."""
        with self._told():
            self._found[0].get_file(self._found[1], str(local))

    def put_all(self, folder: Path, names: Sequence[str], closing: str | None = None) -> None:
        """Writes files of a local folder here, under the same names, ``closing`` last: the one that tells of the others.

        If it is among them, it is removed first: who reads meanwhile finds nothing, and not half.
        """
        if closing is not None and closing in names:
            (self / closing).remove()
        order = sorted(names, key=lambda name: name == closing)
        for name in track(order, f"to {self}", len(order)) if len(order) > 1 else order:
            (self / name).put(folder / name)

    def get_all(self, names: Sequence[str], folder: Path) -> None:
        """Writes files from here into a local folder, under the same names; several at a time, where the store can."""
        parts = [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)]
        for part in track(parts, f"from {self}", len(parts)):
            for name in part:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with self._told():
                fs, path = self._found
                fs.get([f"{path.rstrip('/')}/{name}" for name in part], [str(folder / name) for name in part])

    def beginning(self, most: int) -> bytes | None:
        """The file's first bytes as they are now, whatever was noted of it before; None where there is no file."""
        with self._told():
            fs, path = self._found
            fs.invalidate_cache()
            try:
                return bytes(fs.cat_file(path, start=0, end=most))
            except FileNotFoundError:
                return None

    def remove(self) -> None:
        """Removes the file, if there is one."""
        with self._told("written"):
            fs, path = self._found
            if fs.exists(path):
                fs.rm_file(path)

    def files(self) -> dict[str, int]:
        """Every file below, by its path from here, and its bytes."""
        with self._told():
            fs, path = self._found
            fs.invalidate_cache()
            found = fs.find(path, detail=True)
            root = path.rstrip("/") + "/"
            return {
                name.removeprefix(root): int(facts.get("size") or 0) for name, facts in found.items() if name.startswith(root)
            }

    @contextmanager
    def _told(self, what: str = "read") -> Iterator[None]:
        try:
            yield
        except (ArtifactError, UsageError):
            raise
        except Exception as error:  # of the store's own package
            if what == "read" and isinstance(error, FileNotFoundError):
                raise ArtifactError(f"{self}: no such file") from None
            raise ArtifactError(f"{self}: could not be {what} ({quoted(error)})") from None


Place = Path | Remote
"""Where a file lies: on this machine, or behind fsspec."""


def is_shortened(path: Path) -> bool:
    """Whether a path was made of an address, as ``s3:/bucket`` of ``s3://bucket``."""
    return SHORTENED.match(str(path)) is not None


def placed(place: str | Path | Remote) -> Place:
    """A path of this machine, or an address for fsspec, as ``s3://bucket/folder`` is; ``file://`` is one too.

    Raises:
        UsageError: it was made a path, which no longer is the address; or it names no folder of its store.
    """
    if isinstance(place, Remote):
        return place
    if isinstance(place, Path) and is_shortened(place):
        raise UsageError(f"{place} looks like an address of a store, made a Path; give it as text, with both slashes")
    if not isinstance(place, str) or (address := URL.match(place)) is None:
        return Path(place)
    if not place[address.end() :].strip("/"):
        raise UsageError(f"{plain(place)} names no folder there; give one, as in {plain(address.group())}bucket/folder")
    return Remote(place)


class Spool:
    """A local folder whose files go to a place behind fsspec when it is whole.

    Attributes:
        folder: here files are written.
    """

    def __init__(self, remote: Remote, closing: str) -> None:
        """``closing``: the file that tells of the others."""
        self.remote, self.closing = remote, closing
        self.folder = Path(tempfile.mkdtemp(prefix="prunekit-spool-"))

    def send(self) -> None:
        """Writes the folder's files to their place, the closing one last, and removes the folder.

        Raises:
            ArtifactError: the store does not take them; the folder is kept, and named.
        """
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        try:
            self.remote.put_all(self.folder, [name for name in names if not name.startswith(".")], self.closing)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; everything is kept in {self.folder}") from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def sent(self) -> ArtifactError | None:
        """As ``send``; returns what went wrong."""
        try:
            self.send()
        except ArtifactError as error:
            return error
        return None

    def drop(self) -> None:
        """Removes the folder; nothing is sent."""
        shutil.rmtree(self.folder, ignore_errors=True)
