"""What labels in files stand for: classes by name or index, several at once, or numbers; the names' order is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunekit.errors import UsageError

SHOWN = 8  # classes that a message lists


@dataclass(frozen=True)
class Classes:
    """Names of classes in the order of their indices; ``note`` says how they came by it."""

    names: tuple[str, ...]
    note: str

    def index(self, label: Any, where: str) -> int:
        """The index of a label. Raises UsageError for one that is none."""
        found = _index(label)
        if found is not None and str(label) not in self.names:
            if 0 <= found < len(self.names):
                return found
        elif str(label) in self.names:
            return self.names.index(str(label))
        raise UsageError(f"{where}: the label {label!r:.60} is none of the classes {_listed(self.names)}")


@dataclass(frozen=True)
class Config:
    """What a model's config says of labels: how many, and their names, which are None where they are ``LABEL_0`` and so on."""

    count: int | None = None
    names: tuple[str, ...] | None = None


def config_of(config: Any) -> Config:
    """Of a config of transformers; None has no say."""
    if config is None:
        return Config()
    named: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    try:
        names = tuple(str(named[key]) for key in sorted(named, key=int))
    except (TypeError, ValueError):
        names = ()
    own = names and not all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return Config(getattr(config, "num_labels", None), names if own else None)


def kind_of(labels: Iterable[Any]) -> str:
    """``classes``, ``numbers`` or ``several`` by what labels are, where no task says it."""
    few = list(labels)
    if any(isinstance(one, list) for one in few):
        return "several"
    if all(_index(one) is not None for one in few):
        return "classes"
    return "numbers" if all(_number(one) is not None for one in few) else "classes"


def classes_of(
    labels: Iterable[Any], config: Config, said: Sequence[str] | None, known: Sequence[str] | None, where: str
) -> Classes:
    """The classes of distinct labels.

    The recipe's own order comes first; then indices as they are; the config's names where they are the labels'; the order that
    the data set has; at last the alphabet's.

    Args:
        said: in the recipe.
        known: of the data set's own column of classes.

    Raises:
        UsageError: there are more or fewer than the model has, or a label is none of those said.
    """
    distinct = sorted({str(one) for one in labels})
    indices = [_index(one) for one in distinct]
    if said is not None:
        if config.count is not None and len(said) != config.count:
            raise UsageError(f"data.classes names {len(said)} classes, config.json has num_labels {config.count}")
        found = Classes(tuple(said), "")
        for one in distinct:
            found.index(one, where)
        return found
    if all(one is not None for one in indices) and not set(distinct) <= set(config.names or ()):
        top, least = max(one for one in indices if one is not None), min(one for one in indices if one is not None)
        count = top + 1 if config.count is None else config.count
        if least < 0 or top >= count:
            raise UsageError(
                f"{where}: labels go from {least} to {top}, the model has {count} classes (num_labels), 0 to {count - 1}"
            )
        names = config.names or tuple(known or ()) or tuple(map(str, range(count)))
        return Classes(
            names if len(names) == count else tuple(map(str, range(count))), "labels are indices of the model's classes"
        )
    if config.names is not None and (matched := _matched(distinct, config.names)) is not None:
        return Classes(matched, "by the names in config.json")
    order = tuple(known) if known is not None and set(distinct) <= set(known) else tuple(distinct)
    if config.count is not None and len(order) != config.count:
        raise UsageError(
            f"{where}: has {len(order)} classes ({_listed(order)}), config.json has num_labels {config.count}"
            + (f" ({_listed(config.names)})" if config.names else "")
            + "; say their order in classes (data.classes), or take a model with as many"
        )
    own = config.names or ()
    for index, name in enumerate(order):
        if name in (own) and own.index(name) != index:
            raise UsageError(
                f"{where}: has the classes {_listed(order)}, and {name} is class {index} of them but {own.index(name)} of "
                f"config.json's {_listed(own)}; say their order in classes (data.classes)"
            )
    other = f"; config.json calls them {_listed(config.names)}, so say classes if that order is another" if config.names else ""
    return Classes(order, ("in the data set's order" if known is not None else "in the order of the alphabet") + other)


def several(label: Any, classes: Classes, columns: Sequence[str], where: str) -> np.ndarray:
    """``(classes,)`` of 0 and 1: of a list of names, or of one number a class."""
    values = label if isinstance(label, list) else [label]
    if len(columns) > 1 or (len(values) == len(classes.names) > 1 and all(one in (0, 1) for one in values)):
        found = [_number(one) for one in values]
        if any(one not in (0.0, 1.0) for one in found):
            raise UsageError(f"{where}: labels of several classes are 0 or 1, found {values!r:.60}")
        return np.array(found, np.float32)
    row = np.zeros(len(classes.names), np.float32)
    for one in values:
        row[classes.index(one, where)] = 1
    return row


def numbers(label: Any, where: str) -> np.ndarray:
    """``(k,)`` of numbers."""
    found = [_number(one) for one in (label if isinstance(label, list) else [label])]
    if any(one is None or not math.isfinite(one) for one in found):
        raise UsageError(f"{where}: the label {label!r:.60} is no number")
    return np.array(found, np.float32)


def parsed(labels: Iterable[str]) -> list[Any]:
    """Labels as the table holds them, JSON, each once."""
    return [json.loads(one) for one in dict.fromkeys(labels)]


def _matched(distinct: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The config's names as the labels write them; None where some label is none of them."""
    if set(distinct) <= set(names):
        return names
    folded = {one.casefold(): one for one in distinct}
    if len(folded) == len(distinct) and set(folded) <= {name.casefold() for name in names}:
        return tuple(folded.get(name.casefold(), name) for name in names)
    return None


def _index(label: Any) -> int | None:
    if isinstance(label, bool):
        return int(label)
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, str):
        text = label.strip()
        return int(text) if text.isdecimal() and len(text) < 10 else None
    return label if isinstance(label, int) else None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(str(name)[:40] for name in names[:SHOWN])
    return f"{shown}, …" if len(names) > SHOWN else shown
