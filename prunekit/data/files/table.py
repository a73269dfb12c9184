"""The rows of a source as a table of the ``datasets`` library, every row checked: texts that are there, labels, and a key.

Of files up to ``IN_MEMORY`` bytes it lies in memory; of larger ones in the library's cache on disk, from where it is mapped, so
that a file of any size takes little memory, and is parsed once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from prunekit import bounded
from prunekit.data.files.columns import Columns, chosen
from prunekit.data.files.faults import Faults
from prunekit.data.files.lines import Row, rows
from prunekit.data.files.media import folder_rows
from prunekit.data.files.options import Options
from prunekit.data.files.saved import parquet, saved, silently
from prunekit.data.files.sources import Source
from prunekit.errors import ArtifactError, theirs
from prunekit.imports import needed

IN_MEMORY = 2**26
VERSION = 1
"""Of what the cache holds: a table that is made in another way has another."""


class Table:
    """Checked rows of one split.

    Attributes:
        data: a ``datasets.Dataset`` with the columns ``input`` (a text, a list of words as JSON, a path), ``second`` (the other
            text of a pair), ``bytes`` (of a picture or recording that lies in its data set), ``label`` (JSON) and ``key`` (equal
            for equal inputs).
        columns: where they came from.
        names: of classes, by index, where the source says them.
        note: on rows that were left out.
    """

    def __init__(self, data: Any, columns: Columns, names: Sequence[str] | None, note: str | None, said: str) -> None:
        self.data, self.columns, self.names, self.note, self.said = data, columns, names, note, said

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> Any:
        """A column as one numpy array."""
        return self.data.data.column(name).to_numpy()


def table_of(source: Source, options: Options, task: str | None, fetch: bool) -> dict[str, Table]:
    """The source's rows; of a hub data set those of each of its splits, else ``train`` alone.

    Raises:
        ArtifactError: a broken row, unless they are left out; no row at all.
        UsageError: a column is missing or not clear.
    """
    if source.kind in ("saved", "hub"):
        return {
            name: _made(part.said, part.names, part.rows, options, task, part.feature_names, part.size, part.identity)
            for name, part in saved(source, options, fetch).items()
        }
    if source.kind in ("image", "audio"):
        names, listed = folder_rows(Path(source.places[0]), source.kind)
        return {"train": _made(source.said, names, listed, options, task, None)}
    paths = [Path(place) for place in source.places]
    if paths[0].suffix.lower() == ".parquet":
        part = parquet(paths)
        return {"train": _made(source.said, part.names, part.rows, options, task, part.feature_names, part.size, part.identity)}

    def read(faults: Faults) -> Iterator[tuple[str, Row]]:
        for path in paths:
            for row in rows(path, faults):
                yield str(path), row

    first = next(read(Faults(skip=True)), None)
    if first is None:
        faults = Faults(skip=options.skip_bad)
        for _ in read(faults):  # a file of broken rows alone: the first one is said
            pass
        raise ArtifactError(f"{source.said}: has no rows" + _but(faults))
    size = sum(bounded.size(path) for path in paths)
    return {"train": _made(source.said, list(first[1].values), read, options, task, None, size, lambda: _content(paths))}


def _made(
    said: str,
    names: Sequence[str],
    read: Callable[[Faults], Iterator[tuple[str, Row]]],
    options: Options,
    task: str | None,
    feature_names: Callable[[str], Sequence[str] | None] | None,
    size: int = 0,
    identity: Callable[[], str] | None = None,
) -> Table:
    datasets = needed("datasets")
    columns = chosen(names, options, task, said)
    faults = Faults(options.skip_bad)
    kinds = {"input": "large_string", "key": "int64"}
    if len(columns.inputs) == 2:
        kinds["second"] = "large_string"
    if columns.kind in ("image", "audio"):
        kinds["bytes"] = "large_binary"
    if columns.labels:
        kinds["label"] = "large_string"
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})

    def checked() -> Iterator[dict[str, Any]]:
        for place, row in read(faults):
            try:
                yield _checked(row.values, columns, task)
            except ValueError as error:
                faults.add(place, row.where, str(error))

    if size <= IN_MEMORY or identity is None:
        held: dict[str, list[Any]] = {name: [] for name in kinds}
        for row in checked():
            for name, column in held.items():
                column.append(row[name])
        data = datasets.Dataset.from_dict(held, features=features)
    else:
        mark = hashlib.sha256(json.dumps([VERSION, identity(), repr(columns), task, options.skip_bad]).encode()).hexdigest()[:32]
        with silently(), theirs(f"{said}: writing its table into the cache of datasets"):
            data = _cached(datasets, checked, features, mark, faults)
    if not len(data):
        raise ArtifactError(f"{said}: has no rows" + _but(faults))
    named = feature_names(columns.labels[0]) if feature_names is not None and columns.labels else None
    return Table(data, columns, named, faults.note, said)


def _but(faults: Faults) -> str:
    return f" that can be read; {faults.first}" if faults.first else ""


def _cached(datasets: Any, checked: Callable[[], Iterator[dict[str, Any]]], features: Any, mark: str, faults: Faults) -> Any:
    """The table from the cache; our own refusal of a row passes through the library, which wraps what a generator raises."""
    refused: list[ArtifactError] = []

    def watched() -> Iterator[dict[str, Any]]:
        try:
            yield from checked()
        except ArtifactError as error:
            refused.append(error)
            raise

    try:
        found = datasets.Dataset.from_generator(watched, features=features, fingerprint=mark)
    except Exception:
        if refused:
            raise refused[0] from None
        raise
    note = Path(os.path.dirname(found.cache_files[0]["filename"]), "left_out.json")
    if faults.count:
        note.write_text(json.dumps([faults.count, faults.first]))
    elif note.exists():
        faults.count, faults.first = json.loads(bounded.text(note, bounded.JSON))
    return found


def _checked(values: dict[str, Any], columns: Columns, task: str | None) -> dict[str, Any]:
    """A row as the table has it. Raises ValueError for one that is broken."""
    found: dict[str, Any] = {"second": None, "bytes": None, "label": None}
    if columns.kind in ("image", "audio"):
        found |= _media(values.get(columns.inputs[0]), columns.inputs[0])
    else:
        read = _words if columns.kind == "words" else _text
        texts = [read(values, name) for name in columns.inputs]
        found |= {"input": texts[0], "second": texts[1] if len(texts) > 1 else None}
        found["key"] = _signed(xxhash.xxh3_64_intdigest("\0".join(texts).encode()))
    if columns.labels:
        many = len(columns.labels) == 1 and task in ("token_classification", "multi_label")
        labels = [_label(values, name, many) for name in columns.labels]
        found["label"] = json.dumps(labels[0] if len(labels) == 1 else labels, default=str)
        if columns.kind == "words" and len(_list(labels[0])) != len(json.loads(found["input"])):
            raise ValueError(f"{len(_list(labels[0]))} tags for {len(json.loads(found['input']))} words")
        if task == "seq2seq" and not isinstance(labels[0], str):
            raise ValueError(f"{columns.labels[0]} is {labels[0]!r:.40}, no text")
    return found


def _text(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise ValueError(f"lacks {name}")
    found = values[name]
    if found is None or (isinstance(found, str) and not found.strip()):
        raise ValueError(f"{name} is empty")
    if not isinstance(found, str):
        raise ValueError(f"{name} is {found!r:.40}, no text")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character (a lone surrogate)") from None
    return found


def _words(values: dict[str, Any], name: str) -> str:
    found = values.get(name)
    words = _list(found)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"{name} is {found!r:.60}; it must be a list of words")
    return json.dumps(words)


def _label(values: dict[str, Any], name: str, many: bool) -> Any:
    if name not in values:
        raise ValueError(f"lacks {name}")
    found = values[name]
    if found is None or (isinstance(found, str) and not found.strip()) or (isinstance(found, float) and found != found):
        raise ValueError(f"{name} is empty")
    return _list(found) if many and isinstance(found, str) else found


def _list(value: Any) -> list[Any]:
    """A list, as it is, as JSON, or as a text whose words are parted by spaces."""
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value.split()
        return found if isinstance(found, list) else [found]
    return value.split() if isinstance(value, str) else [] if value is None else [value]


def _media(value: Any, name: str) -> dict[str, Any]:
    """A picture or recording: its path, or its bytes, and a hash of these."""
    found: dict[str, Any] = {"path": value} if isinstance(value, str) else value if isinstance(value, dict) else {}
    content: Any = found.get("bytes")
    path = found.get("path")
    if not content and not path:
        raise ValueError(f"{name} is empty")
    if content or path is None:
        return {"input": str(path or ""), "bytes": content, "key": _signed(xxhash.xxh3_64_intdigest(content))}
    try:
        bounded.size(Path(path))
        with bounded.opened(Path(path)) as file:
            hashed = xxhash.xxh3_64()
            while part := file.read(2**20):
                hashed.update(part)
    except ArtifactError as error:
        raise ValueError(str(error)) from None
    return {"input": str(path), "bytes": None, "key": _signed(hashed.intdigest())}


def _signed(digest: int) -> int:
    """A hash of 64 bits as the table's whole numbers hold it."""
    return digest - 2**63


def _content(paths: Sequence[Path]) -> str:
    hashed = xxhash.xxh3_128()
    for path in paths:
        hashed.update(path.suffix.encode() + b"\0")
        with bounded.opened(path) as file:
            while part := file.read(2**22):
                hashed.update(part)
    return hashed.hexdigest()
