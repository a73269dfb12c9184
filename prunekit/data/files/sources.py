"""What a path of data leads to: files of rows, a saved data set, or a folder of pictures or recordings, split by split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunekit import bounded
from prunekit.data.files.options import ENDINGS, ON_HUB, SPLIT_NAMES
from prunekit.errors import ArtifactError, UsageError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
METADATA = ("metadata.csv", "metadata.jsonl")
DEPTH = 8  # folders inside one another that are looked through
MOST = 5_000_000  # files of a folder


@dataclass(frozen=True)
class Source:
    """Where a split's rows are read from.

    Attributes:
        kind: ``rows`` (files by their endings), ``saved`` (a folder of ``save_to_disk``), ``hub``, ``image`` or ``audio``.
        places: files; of the other kinds the folder, or the address.
        split: of a hub data set, which of its splits.
    """

    kind: str
    places: tuple[str, ...]
    split: str | None = None

    @property
    def said(self) -> str:
        """For messages."""
        return self.places[0] if len(self.places) == 1 else f"{self.places[0]} and {len(self.places) - 1} more"


def sources(files: str | Mapping[str, str]) -> tuple[dict[str, Source], list[str]]:
    """Split -> its source, and notes on what was left out. A single source without a split's name is ``train``.

    Raises:
        ArtifactError: there is nothing, or no kind of data that is known.
    """
    if isinstance(files, str):
        return _found(files)
    found, notes = dict[str, Source](), list[str]()
    for name, place in files.items():
        parts, said = _found(place)
        if len(parts) > 1:
            raise UsageError(f"{place}: has the splits {', '.join(parts)} itself; name that folder alone, without a mapping")
        found[SPLIT_NAMES[name]] = next(iter(parts.values()))
        notes += said
    return found, notes


def _found(place: str) -> tuple[dict[str, Source], list[str]]:
    if place.startswith(ON_HUB):
        return {"train": Source("hub", (place,))}, []
    path = Path(place)
    if not path.is_dir():
        bounded.size(path)
        if path.suffix.lower() not in ENDINGS:
            raise UsageError(
                f"{path}: its ending {path.suffix!r} is unknown; data are read from {', '.join(ENDINGS)} or a folder"
            )
        return {"train": Source("rows", (str(path),))}, []
    if (path / "dataset_dict.json").exists():
        return _named(path, {one.name: Source("saved", (str(one),)) for one in _folders(path) if (one / "state.json").exists()})
    if (path / "state.json").exists():
        return {"train": Source("saved", (str(path),))}, []
    return _of_folder(path)


def _of_folder(path: Path) -> tuple[dict[str, Source], list[str]]:
    every = list(files_in(path))
    kinds = {kind for kind, endings in (("image", IMAGES), ("audio", AUDIO)) if any(_ends(one, endings) for one in every)}
    tables = [one for one in every if _ends(one, ENDINGS) and one.name not in METADATA]
    if len(kinds) == 2:
        raise UsageError(f"{path}: holds pictures and recordings; give a folder of one kind")
    if kinds:
        kind = kinds.pop()
        folders = _folders(path)
        if folders and all(folder.name in SPLIT_NAMES for folder in folders):
            return _named(path, {folder.name: Source(kind, (str(folder),)) for folder in folders})
        return {"train": Source(kind, (str(path),))}, []
    if not tables:
        raise UsageError(f"{path}: holds no data ({', '.join(ENDINGS)}, pictures, recordings, or what save_to_disk wrote)")
    by_split: dict[str, list[str]] = {}
    for one in tables:
        by_split.setdefault(_split_of(one, path), []).append(str(one))
    if set(by_split) == {""}:
        by_split = {"train": by_split[""]}
    for places in by_split.values():
        if len(endings := sorted({Path(one).suffix.lower() for one in places})) > 1:
            raise UsageError(f"{path}: holds files of several kinds ({', '.join(endings)}); name one of them")
    return _named(path, {name: Source("rows", tuple(sorted(places))) for name, places in by_split.items()})


def _named(path: Path, found: Mapping[str, Source]) -> tuple[dict[str, Source], list[str]]:
    """Splits by the names that they have here; a single one is all there is."""
    if len(found) == 1:
        return {"train": next(iter(found.values()))}, []
    kept: dict[str, Source] = {}
    for name, source in found.items():
        if (split := SPLIT_NAMES.get(name)) is not None:
            if split in kept:
                raise UsageError(f"{path}: two splits are {split} by their names; name the one that is meant in a mapping")
            kept[split] = source
    if "train" not in kept:
        raise UsageError(f"{path}: has {', '.join(sorted(found)) or 'nothing'} and no train split; name the splits in a mapping")
    left = sorted(name or "files without a split's name" for name in found if name not in SPLIT_NAMES)
    return kept, [f"data: {path}: left out {', '.join(left)}"] if left else []


def _split_of(file: Path, folder: Path) -> str:
    """The split that a file's name, or its folder's, says: ``train.csv``, ``train-00000-of-00002.parquet``, ``train/a.csv``."""
    for part in (file.stem, *file.relative_to(folder).parts[:-1]):
        word = re.split(r"[^a-z]", part.lower(), maxsplit=1)[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return ""


def files_in(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Every file below a folder in the order of names, hidden ones left out.

    Raises:
        ArtifactError: folders lie too deep, or something in there is no regular file.
    """
    if depth > DEPTH:
        raise ArtifactError(f"{folder}: folders lie deeper inside one another than {DEPTH}")
    try:
        names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if len(names) > MOST:
        raise ArtifactError(f"{folder}: has more than {MOST:,} files")
    for name in names:
        path = folder / name
        if path.is_dir():
            yield from files_in(path, depth + 1)
        else:
            bounded.size(path)
            yield path


def _folders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir() and one.name[0] != ".")


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.suffix.lower() in endings
