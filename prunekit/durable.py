"""How files get their place on the disk: whole or not at all, several as one, whatever ends the process, and when.

What is written comes into a temporary folder beside its place first. A single file is then renamed, which a file system does at
once or not at all. Several files, or a folder, go by a journal: once it stands, everything in it is certain to come, for whoever
opens the folder next goes on with a journal that a killed process left (``recover``), and sweeps up temporaries whose process is
gone, which their locks tell.

Of several ranks (``prunekit.ranks``) the first alone does this, once all have come to it, so that none still looks at what was
there before; the others go on when it has its place. What they put there themselves is thrown away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunekit import bounded, ranks, temporary
from prunekit.errors import ArtifactError, UsageError
from prunekit.remote import Place, is_shortened

PREFIX, SUFFIX = ".prunekit.", ".tmp"
JOURNAL = ".prunekit.commit"
LOCK = ".lock"
DEPTH = 4
"""How deep below a run folder prunekit writes: ``RUN/pruned/NAME/trajectory``."""

on_operation: Callable[[str, Path], None] = lambda what, path: None  # noqa: E731
"""Called before every write, sync, rename and removal: tests fail or end the process there."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file that takes the place of ``path`` on success and disappears on failure.

    Raises:
        ArtifactError: it could not be written (full disk, no permission).
    """
    with _in_step(path.parent) as place:
        if place is not None:
            yield place / path.name
            return
        with _told(path), _temporary(path.parent) as folder:
            temporary = folder / path.name
            on_operation("write", path)
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            _sync(temporary)
            _rename(temporary, path)
            _sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of ``path``, as a whole, on success and disappears on failure.

    Raises:
        ArtifactError: as ``replacing``.
    """
    with together(path.parent) as staged:
        new = staged.folder / path.name
        new.mkdir(exist_ok=True)
        yield new


class Staged:
    """What will take its place in a folder, all of it or nothing.

    Attributes:
        folder: whatever is written here will, under its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: dict[str, str] = {}
        self.removed: list[str] = []
        self.closing: str | None = None

    def take(self, name: str, place: str) -> None:
        """What lies in the folder as ``name`` will come to lie there as ``place``."""
        self.taken[name] = place

    def remove(self, name: str) -> None:
        """What lies in the folder as ``name`` will go."""
        self.removed.append(name)

    def close_with(self, name: str) -> None:
        """The file ``name`` that is written here comes after everything else, and what lies under its name goes before it.

        Who reads that file first, and knows of no journal, finds all of the old, nothing, or all of the new.
        """
        self.closing = name


@contextmanager
def together(folder: Path) -> Iterator[Staged]:
    """Several files and folders that belong together take their places in ``folder`` as one, on success.

    Raises:
        ArtifactError: as ``replacing``.
    """
    with _in_step(folder) as place:
        if place is not None:
            yield Staged(place)
            return
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            finish(folder)
            with _temporary(folder) as temporary:
                staged = Staged(temporary)
                on_operation("write", folder)
                yield staged
                names = sorted(path.name for path in temporary.iterdir())
                moves = {f"{temporary.name}/{name}": name for name in names} | staged.taken
                for source in moves:
                    _sync_tree(folder / source)
                _sync(temporary)
                journal = temporary / JOURNAL
                content = {
                    "moves": [[source, place, (folder / source).stat().st_ino] for source, place in moves.items()],
                    "remove": staged.removed,
                    "closing": staged.closing,
                }
                journal.write_text(json.dumps(content), encoding="utf-8")
                _sync(journal)
                _rename(journal, folder / JOURNAL)  # from here on it is certain
                _sync(folder)
                finish(folder)


@contextmanager
def _in_step(folder: Path) -> Iterator[Path | None]:
    """All ranks write into ``folder`` at the same time; yields where one that is not the first does so, None for the first.

    A folder that takes its place later, and what is in it, is each one's own: there nobody waits.
    """
    inside = any(part.startswith(PREFIX) and part.endswith(SUFFIX) for part in folder.absolute().parts)
    if not inside:
        ranks.wait()
    if ranks.first():
        yield None
    elif inside:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with temporary.folder(PREFIX, SUFFIX) as thrown_away:
            yield Path(thrown_away)
    if not inside:
        ranks.wait()


def remove(path: Path) -> None:
    """Removes a file that nobody needs any more, if it is there."""
    ranks.wait()
    if ranks.first():
        path.unlink(missing_ok=True)
    ranks.wait()


def finish(folder: Path) -> None:
    """Goes on with a journal that stands in ``folder``; where there is none, there is nothing to do.

    Raises:
        ArtifactError: it is not one of prunekit's, or the moves could not be done.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return
    moves, removed, closing = _read(path)
    with _told(folder):
        if any(place == closing and os.path.lexists(folder / source) for source, place, _ in moves):
            on_operation("remove", folder / str(closing))
            (folder / str(closing)).unlink(missing_ok=True)
            _sync(folder)
        for source, place, inode in moves:
            if place != closing:
                _place(folder / source, folder / place, inode)
        for name in removed:
            on_operation("remove", folder / name)
            (folder / name).unlink(missing_ok=True)
        for source, place, inode in moves:
            if place == closing:
                _sync(folder)
                _place(folder / source, folder / place, inode)
        _sync(folder)
        on_operation("remove", path)
        path.unlink(missing_ok=True)


def _place(source: Path, place: Path, inode: int) -> None:
    if not os.path.lexists(source):
        return  # it stands in its place
    if source.parent.is_symlink():
        raise ArtifactError(f"{source.parent}: is a link, and no temporary of prunekit's; remove it")
    if source.is_dir() and not source.is_symlink():
        if source.stat().st_ino == inode:
            if not os.path.lexists(place):
                _rename(source, place)
                return
            if not _exchange(source, place):
                old = source.with_name(f"{PREFIX}{inode}{SUFFIX}")
                _rename(place, old)  # a process killed here leaves the new folder to the next one, by the journal
                _rename(source, place)
                source = old
        on_operation("remove", source)
        shutil.rmtree(source)  # what was there before
    else:
        _rename(source, place)


def _read(path: Path) -> tuple[list[tuple[str, str, int]], list[str], str | None]:
    """A journal may come with somebody else's folder: it may move prunekit's temporaries inside that folder, and nothing else."""
    try:
        content = bounded.parsed(bounded.text(path, bounded.JSON))
        moves = [(str(source), str(place), int(inode)) for source, place, inode in content["moves"]]
        removed = [str(name) for name in content["remove"]]
        closing = content.get("closing")
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{path}: not a whole journal ({error}); remove it") from None
    for source, place, _ in moves:
        first, _, rest = source.rpartition("/")
        if not (_plain(place) and _plain(rest) and (not first or (_plain(first, hidden=True) and first.endswith(SUFFIX)))):
            raise ArtifactError(f"{path}: would move {source!r} to {place!r}; remove it")
    for name in removed:
        if not _plain(name):
            raise ArtifactError(f"{path}: would remove {name!r}; remove it")
    if closing is not None and closing not in [place for _, place, _ in moves]:
        raise ArtifactError(f"{path}: closes with {closing!r}, which it does not move; remove it")
    return moves, removed, closing


def _plain(name: str, hidden: bool = False) -> bool:
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name) and (not hidden or name.startswith(PREFIX))


@contextmanager
def locked(folder: Path, place: Place | None = None) -> Iterator[None]:
    """Keeps other prunekit processes from writing into ``folder``; the lock goes with the process, however it ends.

    What a process that was killed has left is brought to its end or swept up first.

    Args:
        place: what messages call it, where that is another one.

    Raises:
        UsageError: it is an address for fsspec, as ``s3://bucket``, which a path of this machine shortens to ``s3:/bucket``.
        ArtifactError: another one is writing there.
    """
    if is_shortened(folder):
        raise UsageError(
            f"{folder} looks like an address of a store; runs are locked and changed in place, so name a folder of a file "
            "system, and copy it there (a study goes to a store: compare STUDY --out s3://bucket/study)"
        )
    ranks.wait()  # until none reads what is recovered now
    if not ranks.first():
        ranks.wait()
        yield
        return
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    with _lock(folder) as mine:
        if not mine:
            raise ArtifactError(f"{place or folder}: another prunekit is writing here; wait for it, or choose another folder")
        recover(folder)
        ranks.wait()
        try:
            yield
        except BaseException:
            _remove_empty(folder, new)
            raise


def _remove_empty(folder: Path, new: list[Path]) -> None:
    """Removes folders that were made for nothing: the locked one, with its lock, and those above it that are ``new``."""
    if folder in new and [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        with suppress(OSError):  # somebody else has put something there meanwhile
            for place in new:
                place.rmdir()


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Yields whether nobody else holds the folder's lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise ArtifactError(f"{folder}: could not be written ({error.strerror or error})") from None
    try:
        yield _flocked(file) and _is_at(file, folder / LOCK)
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one that lies there: a lock that was removed with its folder locks nothing."""
    try:
        return os.path.samestat(os.fstat(file), path.stat(follow_symlinks=False))
    except OSError:
        return False


def recover(folder: Path, depth: int = DEPTH) -> None:
    """Brings to its end, in ``folder`` and below, what a killed process had begun, and removes what it left behind."""
    finish(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        if path.name.startswith(PREFIX) and path.name.endswith(SUFFIX):
            _sweep(path)
        elif not path.name.startswith(".") and depth > 1:
            recover(path, depth - 1)


def opened(folder: Path) -> None:
    """Before a run folder is read: a journal that was left is gone on with, unless its process still works at it.

    Raises:
        ArtifactError: that could not be done.
    """
    if ranks.first() and any((place / JOURNAL).exists() for place in (folder, folder / "pruned")):
        with _lock(folder) as mine:
            if mine:
                recover(folder)
    ranks.wait()


def _sweep(path: Path) -> None:
    """Removes a temporary folder whose process is gone."""
    with suppress(OSError), _held(path) as mine:
        if mine:
            on_operation("remove", path)
            shutil.rmtree(path)


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A new folder that others see is in use, removed in the end."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent))
        with _held(path) as mine:
            if not mine or not path.exists():  # somebody swept it up before it was held
                continue
            os.chmod(path, 0o777 & ~_umask())
            try:
                yield path
            finally:
                if not (parent / JOURNAL).exists():  # which needs what lies in it
                    shutil.rmtree(path, ignore_errors=True)
            return


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds a folder's lock; yields whether nobody else does."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _flocked(handle)
    finally:
        os.close(handle)


def _flocked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{path}: could not be written ({error.strerror or error})") from error


def _rename(source: Path, place: Path) -> None:
    on_operation("rename", place)
    os.replace(source, place)


def _exchange(first: Path, second: Path) -> bool:
    """Lets two folders change places at once; False where the system or the file system cannot."""
    on_operation("exchange", second)
    library: Any = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux; RENAME_SWAP of macOS is 2 as well
    if hasattr(library, "renameat2"):
        failed = library.renameat2(here, names[0], here, names[1], swap)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, swap)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, outlives a power cut from here on."""
    on_operation("sync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            _sync_tree(inner)
    _sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
