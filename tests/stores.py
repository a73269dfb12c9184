"""An object store on the local disk, for fsspec: late answers, ranges of bytes, whole files, and no rename."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class _File(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.asked("range", self.path)
        LateStore.fetched += end - start
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class LateStore(AbstractFileSystem):
    """Every request takes a while and is noted. ``broken``: names that it neither takes nor gives."""

    protocol = "late"
    cachable = False
    requests: ClassVar[list[tuple[str, str]]] = []
    fetched = 0
    latency = 0.001
    broken: ClassVar[set[str]] = set()

    def asked(self, what: str, path: str) -> None:
        time.sleep(LateStore.latency)
        LateStore.requests.append((what, Path(path).name))
        if what in ("put", "range") and Path(path).name in LateStore.broken:
            raise ConnectionError("gone")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("late://").strip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self.asked("info", path)
        place = Path(path)
        if not place.exists():
            raise FileNotFoundError(path)
        return {"name": path, "size": place.stat().st_size, "type": "directory" if place.is_dir() else "file"}

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = [self.info(str(place)) for place in sorted(Path(path).iterdir())] if Path(path).is_dir() else []
        return found if detail else [facts["name"] for facts in found]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _File:
        assert mode == "rb", "a store takes whole files"
        return _File(self, path, mode, block_size=2**14)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.asked("put", rpath)
        shutil.copyfile(lpath, rpath)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        self.asked("remove", path)
        Path(path).unlink()

    def mv(self, *paths: str, **options: Any) -> None:
        raise AssertionError("a store has no rename")


fsspec.register_implementation("late", LateStore, clobber=True)
