"""Rows of jsonl, json, csv, tsv and txt files, one after the other, each with the line that it stands on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from prunekit import bounded
from prunekit.data.files.faults import Faults
from prunekit.errors import ArtifactError

WHOLE = 2**30
"""Bytes of a JSON file that is no JSON lines: it is read at once."""
FEW_PARAGRAPHS = 8
"""A text of fewer is taken line by line, so that splits can be made of it."""


class Row(NamedTuple):
    """A row, and where it stands: ``line 3``, ``row 3``."""

    where: str
    values: dict[str, Any]


def rows(path: Path, faults: Faults) -> Iterator[Row]:
    """The rows of a file by its ending; broken ones are ``faults``'.

    Raises:
        ArtifactError: it is no regular file, or is broken in a way that leaves no row to go on with.
    """
    read = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table, ".txt": _paragraphs}
    yield from read[path.suffix.lower()](path, faults)


def _text_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """Number and text of every line, its end included; of the file's first one without a byte order mark."""
    bounded.size(path)
    with bounded.opened(path) as file:
        number = 0
        while raw := file.readline(bounded.LINE):
            number += 1
            if len(raw) == bounded.LINE and not raw.endswith(b"\n"):
                raise ArtifactError(f"{path}: line {number} has more than {bounded.LINE:,} bytes")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                faults.add(path, f"line {number}", f"not text in UTF-8 ({error.reason} at byte {error.start + 1})")
                continue
            yield number, text


def _json_lines(path: Path, faults: Faults) -> Iterator[Row]:
    for number, text in _text_lines(path, faults):
        if not text.strip():
            continue
        try:
            found = _parsed(text.rstrip())
        except ValueError as error:
            faults.add(path, f"line {number}", f"not JSON ({error})")
            continue
        if isinstance(found, dict):
            yield Row(f"line {number}", found)
        else:
            faults.add(path, f"line {number}", f"holds {_kind(found)}, not a mapping of columns to values")


def _json(path: Path, faults: Faults) -> Iterator[Row]:
    """JSON lines where the first line is a whole mapping; else a list of mappings, alone or as the only list of one mapping."""
    first = next((text for _, text in _text_lines(path, Faults(skip=True)) if text.strip()), "")
    try:
        as_lines = isinstance(_parsed(first), dict) and not _single(path)
    except ValueError:
        as_lines = False
    if as_lines:
        yield from _json_lines(path, faults)
        return
    bounded.size(path, WHOLE)
    try:
        found = _parsed("".join(text for _, text in _text_lines(path, faults)))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else [found]
    for number, one in enumerate(found if isinstance(found, list) else [found], 1):
        if isinstance(one, dict):
            yield Row(f"row {number}", one)
        else:
            faults.add(path, f"row {number}", f"is {_kind(one)}, not a mapping of columns to values")


def _single(path: Path) -> bool:
    """Whether a file has one line of text."""
    return sum(1 for _, text in islice(_text_lines(path, Faults(skip=True)), 2) if text.strip()) < 2


def _table(path: Path, faults: Faults) -> Iterator[Row]:
    """Rows under a heading, fields in double quotes where they hold a separator or a line's end."""
    reader = csv.reader(
        (text for _, text in _text_lines(path, faults)), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    before = csv.field_size_limit(bounded.LINE)
    try:
        heading: list[str] | None = None
        while True:
            begin = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error) or "limit" in str(error):
                    raise ArtifactError(f"{path}: line {begin}: a quote opens there and is never closed") from None
                faults.add(path, f"line {begin}", f"not a row of a table ({error})")
                continue
            if not fields:
                continue
            if heading is None:
                heading = [name.strip() for name in fields]
                if twice := next((name for name in heading if heading.count(name) > 1), None):
                    raise ArtifactError(f"{path}: line {begin}: two columns are called {twice!r}")
                continue
            if len(fields) != len(heading):
                faults.add(path, f"line {begin}", f"{len(fields)} fields, the heading has {len(heading)}")
                continue
            yield Row(f"line {begin}", dict(zip(heading, fields, strict=True)))
    finally:
        csv.field_size_limit(before)


def _paragraphs(path: Path, faults: Faults) -> Iterator[Row]:
    """Texts that blank lines part, each with the blank lines after it, so that all of them are the file; or its lines."""
    if sum(1 for _ in islice(_parts(path, Faults(skip=True)), FEW_PARAGRAPHS)) == FEW_PARAGRAPHS:
        yield from _parts(path, faults)
        return
    for number, text in _text_lines(path, faults):
        if text.strip():
            yield Row(f"line {number}", {"text": text})


def _parts(path: Path, faults: Faults) -> Iterator[Row]:
    begin, held, blank = 1, list[str](), False
    for number, text in _text_lines(path, faults):
        if text.strip() and blank:
            yield Row(f"line {begin}", {"text": "".join(held)})
            begin, held = number, []
        blank = not text.strip()
        if held or not blank:
            held.append(text)
    if held:
        yield Row(f"line {begin}", {"text": "".join(held)})


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{error.msg}, {line}character {error.colno}") from None


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null", dict: "a mapping"}
    return names.get(type(value), "a number")
