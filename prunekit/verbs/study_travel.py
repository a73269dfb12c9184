"""Where a study's run lies for a worker, and how its files travel.

The run lies where the coordinator has it, if this worker sees the same disk. Otherwise it lies in a folder of the worker's own,
and its files travel: the coordinator sends them where a worker lacks them, and has those back that were made.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prunekit import bounded, durable, temporary, trust
from prunekit.errors import ArtifactError, UsageError
from prunekit.imports import use_working_folder
from prunekit.recipe import read_yaml
from prunekit.version import __version__

WIRE = 2**30
"""Bytes of a run that travels, at most."""
TRAVELS = ("recipe.yaml", "train.json", "trajectory", "scores")
"""What travels of a run folder: what cells are measured from."""
Files = Mapping[str, bytes]
"""Of a run folder, by their path inside it."""


@dataclass(frozen=True)
class Source:
    """What a worker is told of a run; all of it plain data.

    Attributes:
        run: the run folder, as the coordinator's machine names it.
        recipe: trained first; None for a run that is there already.
        shared: a file that the coordinator has put on its disk, and what stands in it.
        folders: on that disk, from which no code is imported.
        version: of the coordinator's prunekit.
    """

    case: str
    seed: int
    run: str
    study: dict[str, Any]
    recipe: dict[str, Any] | None
    device: str | None
    shared: tuple[str, str]
    folders: tuple[str, ...]
    version: str = __version__


@dataclass(frozen=True)
class Lacking:
    """A worker does not see the coordinator's disk and has no files of the run."""


_settled: set[Path] = set()
"""The folder that this process has last made itself ready for."""


def sees(source: Source) -> bool:
    path, text = source.shared
    try:
        return bounded.text(Path(path), 1024) == text
    except ArtifactError:
        return False


def place(source: Source, files: Files | None) -> Path | None:
    """The run's folder on this machine; None where files of it must come first."""
    if source.version != __version__:
        raise UsageError(f"a worker has prunekit {__version__}, the study is run by {source.version}; install the same one")
    if not sees(source):
        here = _scratch() / source.shared[1] / Path(source.run).name
        if files is not None:
            shutil.rmtree(here, ignore_errors=True)
            unpack(files, here)
        elif not here.exists():
            return None
        if files is not None and "recipe.yaml" in files:
            trust.remember(here, read_yaml(here / "recipe.yaml"))  # it is the coordinator's user who sends it
        folders = [here]
    else:
        here = Path(source.run)
        folders = [here, *map(Path, source.folders)]
    if _settled != {here}:
        use_working_folder(*folders)
        if multiprocessing.parent_process() is not None:
            warnings.simplefilter("ignore")
        _settled.clear()
        _settled.add(here)
    return here


@cache
def _scratch() -> Path:
    """A folder that goes with this process: of a Dask worker inside its own, which Dask removes."""
    if (distributed := sys.modules.get("distributed")) is not None:
        with suppress(ValueError):  # it is none
            return Path(tempfile.mkdtemp(prefix="prunekit-", dir=distributed.get_worker().local_directory))
    return Path(tempfile.mkdtemp(prefix="prunekit-", dir=temporary.root()))


def travelling(run: Path) -> list[Path]:
    """The files of a run folder that travel."""
    paths = [path for name in TRAVELS for path in (run / name, *sorted((run / name).rglob("*"))) if path.is_file()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(run).parts)]


def packed(run: Path) -> Files:
    """A run folder's files, to travel.

    Raises:
        ArtifactError: they are more than ``WIRE`` bytes.
    """
    paths = travelling(run)
    total = sum(map(bounded.size, paths))
    if total > WIRE:
        raise ArtifactError(
            f"{run}: has {total / 1e9:.1f} GB, and to workers that do not see this disk at most {WIRE / 1e9:.1f} GB travel; "
            "run the study on a disk that all see, or record fewer steps (train.record.every)"
        )
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def unpack(files: Files, run: Path) -> None:
    """Puts a run's files into its folder, all or none."""
    with durable.together(run) as staged:
        for name, content in files.items():
            if (parts := Path(name).parts)[0] not in TRAVELS or ".." in parts:
                raise ArtifactError(f"{name}: is no file of a run")
            (staged.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staged.folder / name).write_bytes(content)
