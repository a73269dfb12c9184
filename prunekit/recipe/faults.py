"""Messages about values in a recipe that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunekit.errors import nearest

KIND = re.compile(r"(str|int|float|bool|list|dict|tuple|literal|constrained-\w+|function-\w+)(\[.*\])?|\[key\]")
"""What pydantic puts into the place of a fault where a value may be of several kinds."""
MOST = 5  # faults told of one file
SHAPES = {
    "dict_type": "a mapping of names to values is wanted here",
    "model_type": "a section of keys and values is wanted here",
    "list_type": "a list is wanted here, [ONE, TWO]",
    "tuple_type": "a list is wanted here, [ONE, TWO]",
}
"""The message about a value of another shape, by pydantic's kind of fault."""


class Misfit(ValueError):
    """Values of a section that do not go together; ``options`` says it to who gave them as options of a command."""

    def __init__(self, message: str, options: str) -> None:
        super().__init__(message)
        self.options = options


def misfit_of(faults: Sequence[Any]) -> Misfit | None:
    """The first of a section's faults that options have words of their own for."""
    causes = (fault.get("ctx", {}).get("error") for fault in faults)
    return next((cause for cause in causes if isinstance(cause, Misfit)), None)


def faults_told(
    path: str | Path, faults: Sequence[Any], model: type[BaseModel], what: str, option: Callable[[str], str] | None = None
) -> str:
    """Every fault of values that ``model`` does not take, those of one value's several kinds (text or a mapping, say) in one.

    Args:
        what: the whole is called: ``recipe``.
        option: what a user who gave options calls the value at a key.
    """
    told: dict[str, str] = {}
    named = [tuple(part for part in fault["loc"] if not (isinstance(part, str) and KIND.fullmatch(part))) for fault in faults]
    fits = [
        (fault, loc)
        for fault, loc in zip(faults, named, strict=True)
        if fault["type"] not in SHAPES or not any(len(other) > len(loc) and other[: len(loc)] == loc for other in named)
    ]  # a value of one of its several shapes is told what is wrong inside of it
    for fault, loc in fits[:MOST]:
        text = _fault(path, {**fault, "loc": loc}, model, what, option)
        key = ".".join(map(str, loc))
        told[key] = f"{told[key]}, or {text.rsplit(': ', 1)[1]}" if key in told else text
    more = f"; and {len(fits) - MOST} more" if len(fits) > MOST else ""
    return "; ".join(told.values()) + more


def _fault(path: str | Path, fault: Any, model: type[BaseModel], what: str, option: Callable[[str], str] | None) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    place = option(key) if option and key else f"{path}: {key}"
    if fault["type"] == "extra_forbidden":
        *parents, last = fault["loc"]
        known = _fields_at(parents, model)
        return f"{path}: {key} is not a {what} key; {nearest(str(last), known)}"
    message = SHAPES.get(fault["type"]) or fault["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if fault["type"] == "too_short":
        message = "give one at least"
    if fault["type"] == "missing":
        return f"{place} is missing"
    if not key:
        return f"{path}: {message}"
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        message = "this is text; write it in quotes"
    if isinstance(fault["input"], dict) and fault["type"] == "value_error":  # of several keys, which the message names
        return f"{place}: {message}"
    shown = repr(fault["input"])
    return f"{place} is {shown if len(shown) < 80 else shown[:77] + '...'}: {message[0].lower()}{message[1:]}"


def _fields_at(parents: list[Any], model: Any) -> list[str]:
    for part in parents:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = next(kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _kinds(annotation: Any) -> Iterator[Any]:
    """An annotation and everything inside of it."""
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _kinds(inner)
