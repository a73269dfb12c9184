"""Which rows are for training, validation, test and scoring: as given, or dealt out by a seed; equal inputs stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prunekit.data.files.options import Options
from prunekit.errors import UsageError

FIRST = ("test", "validation", "scoring", "train")
"""An input that two given splits have is left to the one that comes first here."""
SCORING = 512  # of the training rows, by default, where a tenth of them is more
LEAST = 2  # different inputs of a split that is made


def dealt(
    keys: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray | None], options: Options, where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Split -> the split of the table and the rows there, ``(rows, 2)``: which table (by its place in ``keys``) and which row.

    Test and validation rows that are not given come out of the training rows, scoring rows too: no input is in two splits.
    Those that are made have the labels in about the shares that all rows have.

    Args:
        keys: by given split, one number a row, equal for equal inputs.
        labels: by given split, one text a row; None without labels.

    Raises:
        UsageError: there are too few different inputs; says how many are needed.
    """
    notes: list[str] = []
    seen = {text for marks in labels.values() if marks is not None for text in marks}
    if len(seen) == 1:
        notes.append(f"data: every row has the label {seen.pop():.60}: no figure tells a model from one that always answers so")
    kept = _apart(keys, notes)
    order = list(keys)
    found = {name: _places(order.index(name), rows) for name, rows in kept.items()}
    missing = [name for name in ("validation", "test", "scoring") if name not in found]
    groups = _groups(keys["train"], kept["train"])
    needed = LEAST * (1 + len(missing))
    if len(groups) < needed:
        raise UsageError(
            f"{where}: has {len(groups)} different {'input' if len(groups) == 1 else 'inputs'} to make the splits "
            f"{', '.join(('train', *missing))} of; at least {needed} are needed"
        )
    if missing:
        sizes = _sizes(len(groups), missing, options, where)
        parts = _deal(groups, None if labels["train"] is None else labels["train"], sizes, options.seed)
        train = order.index("train")
        found |= {name: _places(train, rows) for name, rows in parts.items()}
    return found, notes


def _apart(keys: Mapping[str, np.ndarray], notes: list[str]) -> dict[str, np.ndarray]:
    """The rows of every given split whose input no split before has."""
    kept: dict[str, np.ndarray] = {}
    seen = np.array([], np.int64)
    for name in (one for one in FIRST if one in keys):
        fresh = ~np.isin(keys[name], seen)
        if lost := int((~fresh).sum()):
            others = ", ".join(one for one in FIRST[: FIRST.index(name)] if one in keys)
            notes.append(f"data: {lost:,} {name} rows are left out, because {others} has the same inputs")
        kept[name] = np.flatnonzero(fresh)
        seen = np.concatenate([seen, np.unique(keys[name])])
    if empty := next((name for name, rows in kept.items() if not len(rows)), None):
        raise UsageError(f"data: every {empty} row has an input that another split has too")
    return kept


def _groups(keys: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Rows with equal inputs, groups in the order of their first rows."""
    _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    parts = np.split(rows[order], np.cumsum(np.bincount(inverse))[:-1])
    return [parts[group] for group in np.argsort(first, kind="stable")]


def _sizes(groups: int, missing: Sequence[str], options: Options, where: str) -> dict[str, int]:
    """How many groups each split gets."""
    sizes = {
        name: max(LEAST, round(share * groups)) for name, share in (("validation", options.validation), ("test", options.test))
    }
    sizes = {name: size for name, size in sizes.items() if name in missing}
    left = groups - sum(sizes.values())
    if "scoring" in missing:
        sizes["scoring"] = max(LEAST, min(SCORING, round(left / 10))) if options.scoring is None else options.scoring
    left = groups - sum(sizes.values())
    if left < LEAST:
        raise UsageError(
            f"{where}: {groups} different inputs do not make {', '.join(f'{size} {name}' for name, size in sizes.items())} and "
            f"{LEAST} training rows; {sum(sizes.values()) + LEAST} are needed"
        )
    return {**sizes, "train": left}


def _deal(groups: list[np.ndarray], labels: np.ndarray | None, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Rows of every split, in their own order.

    Groups go in a random order, sorted by label where there are labels, one after another to the split that lags most behind
    its share of those dealt so far.
    """
    order = np.random.default_rng(seed).permutation(len(groups))
    if labels is not None:
        order = order[np.argsort(np.array([str(labels[groups[one][0]]) for one in order]), kind="stable")]
    names, wanted = list(sizes), np.array(list(sizes.values()), float)
    share, given = wanted / wanted.sum(), np.zeros(len(wanted))
    to: list[int] = []
    for number in range(1, len(groups) + 1):
        lag = np.where(given < wanted, share * number - given, -np.inf)
        to.append(int(lag.argmax()))
        given[to[-1]] += 1
    place = np.array(to)
    return {name: np.sort(np.concatenate([groups[one] for one in order[place == index]])) for index, name in enumerate(names)}


def _places(table: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), table), rows], 1)
