"""Where a study lies: in a folder of this machine, or on a store, with a folder of this machine in which it is worked at.

On a store every file is written whole, and of several that belong together the one that tells of the others comes last. What is
there counts: another machine goes on with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from prunekit import bounded, trust
from prunekit.durable import PREFIX, SUFFIX, locked, together
from prunekit.errors import ArtifactError, UsageError
from prunekit.lease import Lease
from prunekit.remote import Place, Remote, placed
from prunekit.verbs.study_cells import Job
from prunekit.verbs.study_travel import TRAVELS

MANIFEST = "trajectory/trajectory.json"
"""Of a run: a run without it is none."""


class StudyFolder:
    """A study's place.

    Attributes:
        place: as it was named.
        folder: in which it is worked at: the place itself, or of an address a folder among prunekit's own (``trust.state``),
            which goes away when everything is on the store.
    """

    def __init__(self, place: str | Place) -> None:
        self.place = placed(place)
        self.folder = _spool(self.place) if isinstance(self.place, Remote) else self.place
        self._lease: Lease | None = None
        self._there: dict[str, tuple[int, int]] = {}
        """Files that lie on the store as they lie here -> their bytes and their time here."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, nobody else works at the study, see ``prunekit.lease`` for how far that goes on a store.

        Raises:
            ArtifactError: another process works there, or the store cannot be written.
        """
        with locked(self.folder, self.place):
            if isinstance(self.place, Path):
                yield
                return
            with Lease(self.place, self.folder) as self._lease:
                yield
            shutil.rmtree(self.folder, ignore_errors=True)  # what is in it lies on the store

    def told(self, path: Path) -> str:
        """A path as the study's result names it: on a store as seen from there."""
        return path.relative_to(self.folder).as_posix() if self._is_there(path) else str(path)

    def fetch(self, jobs: Sequence[Job]) -> None:
        """Brings what the jobs have on the store: their cells, and runs that are whole. A worker's files of that name go.

        Raises:
            ArtifactError: the store cannot be read, or another process works at a run.
        """
        if isinstance(self.place, Path):
            return
        sizes = self.place.files()
        with tempfile.TemporaryDirectory(prefix=PREFIX, suffix=SUFFIX, dir=self.folder) as temporary:
            for job in jobs:
                here = job.cells.relative_to(self.folder).as_posix()
                small = [name for name in _below(here, sizes) if sizes[name] <= bounded.JSON]
                self._bring([name for name in small if name.endswith(".json")], Path(temporary))
                if job.recipe is not None:
                    self._bring_run(job.run, sizes, Path(temporary))

    def send(self, paths: Iterable[Path], closing: Path | None = None) -> None:
        """Writes files to the store that it has not got yet, ``closing`` last; what lies outside the folder stays where it is.

        Raises:
            ArtifactError: the store does not take them, or another process has gone on there.
        """
        names = [path.relative_to(self.folder).as_posix() for path in paths if self._is_there(path)]
        new = [name for name in names if self._there.get(name) != self._stamp(name)]
        if not new or isinstance(self.place, Path):
            return
        try:
            if self._lease is not None:
                self._lease.check()
            self.place.put_all(self.folder, new, None if closing is None else closing.relative_to(self.folder).as_posix())
        except ArtifactError as error:
            kept = f"everything finished is kept in {self.folder}, and the same command goes on with it"
            raise ArtifactError(f"{error}; {kept}") from None
        self._note(new)

    def _is_there(self, path: Path) -> bool:
        return isinstance(self.place, Remote) and path.is_relative_to(self.folder)

    def _bring(self, names: Sequence[str], temporary: Path) -> None:
        """Single files, each of which is whole."""
        assert isinstance(self.place, Remote)
        self.place.get_all(names, temporary)
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, self.folder / name)
        self._note(names)

    def _bring_run(self, run: Path, sizes: dict[str, int], temporary: Path) -> None:
        """A run's files; of the very recording that lies here, those that are lacking."""
        assert isinstance(self.place, Remote)
        here = run.relative_to(self.folder).as_posix()
        names = [name for name in _below(here, sizes) if PurePosixPath(name).relative_to(here).parts[0] in TRAVELS]
        if f"{here}/{MANIFEST}" not in names:
            return
        with locked(run):
            (self.place / here / MANIFEST).get(temporary / "manifest")
            same = (run / MANIFEST).is_file() and (run / MANIFEST).read_bytes() == (temporary / "manifest").read_bytes()
            if same:
                self._bring([name for name in names if not (self.folder / name).exists()], temporary)
            else:
                with together(run) as staged:
                    inside = [PurePosixPath(name).relative_to(here).as_posix() for name in names]
                    (self.place / here).get_all(inside, staged.folder)
            self._note(name for name in names if (self.folder / name).stat().st_size == sizes[name])

    def _note(self, names: Iterable[str]) -> None:
        self._there |= {name: self._stamp(name) for name in names}

    def _stamp(self, name: str) -> tuple[int, int]:
        found = (self.folder / name).stat()
        return found.st_size, found.st_mtime_ns


def _below(folder: str, names: Iterable[str]) -> list[str]:
    """Those of a store's names that lie below a folder. A name there is any text; hidden ones, and ``..``, are left."""
    found = [name for name in names if name.startswith(f"{folder}/") and PurePosixPath(name).as_posix() == name]
    return [name for name in found if not any(part.startswith(".") for part in name.split("/"))]


def _spool(place: Remote) -> Path:
    """The folder of this machine for an address: the same one each time, so that a command that was cut off goes on."""
    url = place.url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", place.name).lstrip(".")[:40]
    try:
        return trust.state() / "studies" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    except OSError as error:
        raise UsageError(f"{place}: needs a folder of this machine to work in ({error}); set {trust.STATE} to one") from None
