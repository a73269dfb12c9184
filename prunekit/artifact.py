"""A JSON artifact: a frozen dataclass that saves and loads itself, each of its fields checked against its annotation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NotRequired, Self, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from prunekit import checkpoint
from prunekit.errors import ArtifactError
from prunekit.remote import Place

SOMETIMES = {"sometimes": True}
"""Metadata of a field, None by default, that the file has only where there is something to say."""
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null", dict: "a mapping",
         list: "a list"}  # fmt: skip


class Cost(TypedDict):
    """What making an artifact took."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Base of what prunekit keeps as JSON.

    A subclass is a frozen dataclass. Its fields are the keys of the file, in the order of the file. Their types are those of
    JSON: ``str``, numbers, ``bool``, ``list``, ``dict``, ``Literal``, ``TypedDict`` (which may hold further keys), ``Any``, and
    each of them or None. A field with a default may be absent from a file, which is then older than the field.

    Attributes:
        KIND: what the file says that it is.
        CALLED: the same in a sentence.
        SCHEMA: the newest form of the file that this prunekit knows. It rises when a file means something else than before.
    """

    KIND: ClassVar[str]
    CALLED: ClassVar[str]
    SCHEMA: ClassVar[int] = 1

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        absent = {each.name for each in fields(self) if each.metadata == SOMETIMES and values[each.name] is None}
        return {"schema": self.SCHEMA, "kind": self.KIND, **{k: v for k, v in values.items() if k not in absent}}

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            ArtifactError: it could not be written.
        """
        checkpoint.write_json(path, self.content())

    @classmethod
    def load(cls, path: Place) -> Self:
        """Reads the file.

        Raises:
            ArtifactError: it is missing, damaged, another artifact, or of a newer schema; names the file and the field.
        """
        found = checkpoint.read_json(path, cls.KIND)
        with checkpoint.reading(path, cls.CALLED):
            conform(found["schema"], int, "schema")
            if found["schema"] > cls.SCHEMA:
                raise ArtifactError(f"{path}: its schema is {found['schema']}, of a newer prunekit; this one reads {cls.SCHEMA}")
            content = cls.brought_up_to_date(found)
            values = {}
            hints = get_type_hints(cls)
            for each in fields(cls):
                if each.name in content:
                    conform(content[each.name], hints[each.name], each.name)
                    values[each.name] = content[each.name]
                elif each.default is MISSING and each.default_factory is MISSING:
                    raise KeyError(each.name)
            loaded = cls(**values)
            loaded.check()
        return loaded

    @classmethod
    def brought_up_to_date(cls, content: dict[str, Any]) -> dict[str, Any]:
        """A file's content as today's prunekit would have written it: a subclass fills in what older files lack inside fields."""
        return content

    def check(self) -> None:
        """What annotations cannot say about a file's content.

        Raises:
            ValueError, LookupError, TypeError: names the field; ``load`` names the file.
        """


def conform(value: Any, kind: Any, where: str) -> None:
    """Checks a value of a JSON file against an annotation.

    Args:
        where: the field, for the message.

    Raises:
        ValueError: it is of another type; the innermost field is named.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is NotRequired:
        conform(value, inner[0], where)
    elif origin in (Union, UnionType):
        if value is not None or type(None) not in inner:
            _one_of(value, [one for one in inner if one is not type(None)], where)
    elif origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {_short(value)}; it must be one of {', '.join(map(repr, inner))}")
    elif is_typeddict(kind):
        _plain(value, dict, where)
        for key, each in _hints(kind).items():
            if key in value:
                conform(value[key], each, f"{where}.{key}")
            elif get_origin(each) is not NotRequired:
                raise ValueError(f"{where} has no {key!r}")
    elif origin is dict:
        _plain(value, dict, where)
        for key, one in value.items():
            conform(one, inner[1], f"{where}.{key}")
    elif origin is list:
        _plain(value, list, where)
        for number, one in enumerate(value):
            conform(one, inner[0], f"{where}[{number}]")
    else:
        _plain(value, kind, where)


def _one_of(value: Any, kinds: Sequence[Any], where: str) -> None:
    """Raises ValueError when the value is of none of the kinds, with what the first lacks."""
    faults = []
    for kind in kinds:
        try:
            conform(value, kind, where)
        except ValueError as fault:
            faults.append(fault)
    if len(faults) == len(kinds):
        raise faults[0]


def _plain(value: Any, kind: type, where: str) -> None:
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} is {_short(value)}; it must be {NAMES.get(kind, kind.__name__)}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
