"""Files that may come from anybody are read within bounds: regular files alone, of a size, a depth and numbers that can be meant.

What is larger is refused before it is read. Whoever makes a file on purpose to hang or to fill a machine gets one line instead.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from prunekit.errors import ArtifactError
from prunekit.remote import Place, Remote

RECIPE = 2**16
"""Bytes of a recipe or study. Recipes take 2 to 10 kB; YAML is read at about 100 kB a second."""
JSON = 2**26
"""Bytes of a JSON artifact, or of a safetensors file's header. The largest that prunekit writes (kept indices of a model with
thousands of layers) take some 10 MB; these are read in half a second."""
LINE = 2**24
"""Bytes of a line in a recording's log of steps: the samples of one step take some kB."""
VALUES = 2 * 10**6
"""Values in a JSON file: an empty list takes 3 bytes there and 64 in memory, so a file's size alone promises little."""
NESTING = 64
"""Lists and mappings inside one another, in recipes and JSON; what prunekit writes has about ten."""
DIGITS = 300
"""Of a number: one of more is larger than any that can be computed with."""

LONG_NUMBER = re.compile(f'(?<![A-Za-z0-9"])[0-9]{{{DIGITS}}}')
LARGE_EXPONENT = re.compile(r"[0-9][eE]\+?[0-9]{3}")  # in a text that is a hash, too
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character that JSON writes in two
KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip


def size(path: Place, most: int | None = None) -> int:
    """How many bytes a file has.

    Args:
        most: that it may have.

    Raises:
        ArtifactError: there is none, it is no regular file (whose reading could wait for ever), or it is larger.
    """
    if isinstance(path, Remote):
        return _within(path, path.size(), most)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for holds, name in KINDS.items() if holds(found.st_mode)), "something else")
        raise ArtifactError(f"{path}: is {kind}, not a file")
    return _within(path, found.st_size, most)


def _within(path: Place, found: int, most: int | None) -> int:
    if most is not None and found > most:
        raise ArtifactError(f"{path}: has {found:,} bytes; such a file has {most:,} at most")
    return found


def text(path: Place, most: int) -> str:
    """A text file's content.

    Raises:
        ArtifactError: see ``size``; or it cannot be read, or is not UTF-8.
    """
    size(path, most)
    with opened(path) as file:
        return file.read(most).decode("utf-8")


def lines(path: Place) -> Iterator[str]:
    """The lines of a text file, one after the other; what stands after the last line's end is none.

    Raises:
        ArtifactError: see ``text``; or a line is longer than ``LINE``.
    """
    size(path)
    with opened(path) as file:
        while (line := file.readline(LINE)).endswith(b"\n"):
            yield line.decode("utf-8")
        if len(line) == LINE:
            raise ArtifactError(f"{path}: has a line of more than {LINE:,} bytes")


@contextmanager
def opened(path: Place) -> Iterator[BinaryIO]:
    """A file to read bytes from; what is wrong with it, or with its text, becomes one line.

    Raises:
        ArtifactError: it cannot be read, or is not UTF-8 where it is decoded inside.
    """
    try:
        if isinstance(path, Remote):
            with path.open() as stream:
                yield stream
            return
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe that has come since is not waited for
            yield file
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start:,})") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from None


def parsed(content: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not JSON, holds NaN or a number that cannot be computed with, too many values, or too deep ones.
    """
    if sum(map(content.count, ",[{")) > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    if LONG_NUMBER.search(content):
        raise ValueError(f"a number of more than {DIGITS} digits")
    try:
        found = json.loads(content, parse_constant=_constant, parse_float=_finite if LARGE_EXPONENT.search(content) else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {NESTING}") from None
    check_nesting(found)
    if HALF.search(content):
        json.dumps(found, ensure_ascii=False).encode()  # raises for half a character, which no file or terminal takes
    return found


def read_json(path: Place) -> Any:
    """What a JSON file says.

    Raises:
        ArtifactError: see ``text``; or it is not JSON, see ``parsed``.
    """
    try:
        return parsed(text(path, JSON))
    except ValueError as error:
        raise ArtifactError(f"{path}: not a readable JSON file ({error})") from None


def mapping(path: Place) -> dict[str, Any]:
    """What a JSON file of another library says, which is a mapping.

    Raises:
        ArtifactError: see ``read_json``; or it holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: holds a {type(found).__name__}, not a mapping")
    return found


def check_nesting(content: Any) -> None:
    """Raises ValueError where lists and mappings lie deeper inside one another than ``NESTING``."""
    level, depth = [content], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
        if depth > NESTING:
            raise ValueError(f"nested deeper than {NESTING}")


def check_header(path: Place) -> None:
    """Refuses a file whose safetensors header would be larger than the file, or than any that is meant.

    Raises:
        ArtifactError: see ``size``; or it promises what it does not hold.
    """
    whole = size(path)
    with opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(whole - 8, JSON):
        raise ArtifactError(f"{path}: not a whole safetensors file (a header of {length:,} bytes in {whole:,}; {JSON:,} at most)")


def _inside(outer: Any) -> Any:
    return [value for value in (outer.values() if isinstance(outer, dict) else outer) if isinstance(value, dict | list)]


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is larger than any number that can be computed with")
    return value
