"""Folders of pictures or recordings: a class a folder, or a table (metadata.csv, metadata.jsonl) that says each file's row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from prunekit.data.files.faults import Faults
from prunekit.data.files.lines import Row, rows
from prunekit.data.files.sources import AUDIO, IMAGES, METADATA, files_in
from prunekit.errors import UsageError

FILE_NAME = "file_name"
"""The column of a metadata table that names the file, relative to it."""
Read = Callable[[Faults], Iterator[tuple[str, Row]]]


def folder_rows(folder: Path, kind: str) -> tuple[list[str], Read]:
    """The columns of a folder's rows, and what reads them: ``kind`` holds a path, ``label`` the class.

    Raises:
        UsageError: files lie in no class's folder, or the table names no files.
    """
    every = list(files_in(folder))
    tables = [path for path in every if path.name in METADATA]
    if len(tables) > 1:
        raise UsageError(f"{folder}: has {len(tables)} tables ({tables[0].name} and another); one can be read")
    if tables:
        return _of_table(tables[0], kind)
    found = [path for path in every if path.suffix.lower() in (IMAGES if kind == "image" else AUDIO)]
    if loose := next((path for path in found if path.parent == folder), None):
        raise UsageError(
            f"{folder}: {loose.name} lies in no folder of a class, and there is no metadata.csv with {FILE_NAME} and a label"
        )

    def read(faults: Faults) -> Iterator[tuple[str, Row]]:
        for path in found:
            yield (
                str(path),
                Row("picture" if kind == "image" else "recording", {kind: str(path), "label": path.relative_to(folder).parts[0]}),
            )

    return [kind, "label"], read


def _of_table(table: Path, kind: str) -> tuple[list[str], Read]:
    first = next(rows(table, Faults(skip=True)), None)
    if first is None or FILE_NAME not in first.values:
        raise UsageError(f"{table}: has no column {FILE_NAME}, which names each row's file")

    def read(faults: Faults) -> Iterator[tuple[str, Row]]:
        for row in rows(table, faults):
            name = row.values.get(FILE_NAME)
            if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                faults.add(table, row.where, f"{FILE_NAME} is {name!r:.60}; it must name a file below that folder")
                continue
            others = {key: value for key, value in row.values.items() if key != FILE_NAME}
            yield str(table), Row(row.where, {kind: str(table.parent / name), **others})

    return [kind, *(name for name in first.values if name not in (FILE_NAME, kind))], read
