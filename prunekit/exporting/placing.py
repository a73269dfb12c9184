"""How an export takes its place: as a whole folder, or file by file around the run that lies in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prunekit import durable

RUN = "prunekit"
"""The run folder inside the folder of a model that ``compress`` made."""
CLOSING = "config.json"
"""Comes last where files take their places one by one: a folder without it is no model to transformers."""


def run_in(folder: Path) -> Path | None:
    """The run that ``compress`` keeps in ``folder``, finished, cut off or hardly begun; None for none."""
    run = folder / RUN
    if run.is_symlink() or not run.is_dir():
        return None
    begun = any((run / name).is_file() for name in ("recipe.yaml", durable.JOURNAL))
    return run if begun or all(path.name.startswith(".") for path in run.iterdir()) else None


def files_in(folder: Path) -> set[str]:
    """What lies in ``folder``, seen from there, without the run in it and what a killed process left."""
    run = run_in(folder)
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {str(path) for path in found if not path.parts[0].startswith(durable.PREFIX) and (run is None or path.parts[0] != RUN)}


@contextmanager
def taking_place(folder: Path, before: Sequence[str]) -> Iterator[Path]:
    """Yields an empty folder; what is written there takes the place of the export in ``folder``, all of it or nothing.

    A run in ``folder`` stays where it is. The files around it change one by one then, by a journal which the next command goes
    on with, and transformers finds the old model, none, or the new one.

    Args:
        before: files of the export that stands there.

    Raises:
        ArtifactError: it could not be written.
    """
    if run_in(folder) is None:
        with durable.replacing_folder(folder) as temporary:
            yield temporary
        return
    with durable.together(folder) as staged:
        yield staged.folder
        for name in before:
            if not (staged.folder / name).exists() and "/" not in name:
                staged.remove(name)
        if (staged.folder / CLOSING).exists():
            staged.close_with(CLOSING)


def recover(folder: Path) -> None:
    """Brings to its end what a killed process had begun to put there."""
    place = folder.parent if run_in(folder) is None else folder
    if place.is_dir():
        durable.recover(place, depth=1)
