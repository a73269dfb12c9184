"""Files to samples: what a data factory would return, of a path and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.data.files import labels as of_labels
from prunekit.data.files.columns import LANGUAGE
from prunekit.data.files.dealing import dealt
from prunekit.data.files.labelled import Answers, Pictures, Recordings, Rows, Tagged, Texts
from prunekit.data.files.options import Options
from prunekit.data.files.processors import CUT, WINDOW, Home, home_of
from prunekit.data.files.sources import sources
from prunekit.data.files.table import VERSION, Table, table_of
from prunekit.data.files.windows import EOS, MaskedWindows, Windows
from prunekit.data.splits import SPLITS
from prunekit.errors import UsageError

SECONDS = 10  # of a recording that are kept by default


def read_files(
    files: str | Mapping[str, str], options: Options, *, task: str | None, model: str | None, fetch: bool = True
) -> dict[str, Any]:
    """The splits, and their ``fingerprint``, as a data factory returns them; of text also ``decode``.

    Args:
        files: a file, a folder, the address of a hub data set, or a mapping of splits to these.
        task: what the model is for; None where labels show whether it is classification or regression.
        model: the model's folder, for its config, tokenizer and processors; None of a factory's.
        fetch: a hub data set may be downloaded.

    Raises:
        ArtifactError: a file is missing or broken, or a row is.
        UsageError: columns or labels do not fit, there are too few rows, or something is not installed.
    """
    home = home_of(model, options)
    found, notes = sources(files)
    tables: dict[str, Table] = {}
    for name, source in found.items():
        read = table_of(source, options, task, fetch)
        tables |= read if len(read) > 1 else {name: next(iter(read.values()))}
    where = next(iter(tables.values())).said
    if len({(table.columns.kind, len(table.columns.inputs)) for table in tables.values()}) > 1:
        raise UsageError(f"{where}: the splits have different columns; name those that are meant (text, label)")
    every = list(tables.values())
    labelled = bool(every[0].columns.labels)
    notes += [table.note for table in every if table.note]
    keys = {name: table.column("key") for name, table in tables.items()}
    marks: dict[str, Any] = {name: table.column("label") if labelled else None for name, table in tables.items()}
    places, said = dealt(keys, marks, options, where)
    made, classes, explained = _maker(every, options, task, home, where)
    rows = {name: made(name, places[name]) for name in SPLITS}
    for one in rows.values():
        one.classes = classes
    rows["train"].said = [*notes, *said, *explained]
    content = hashlib.sha256()
    for name in tables:
        content.update(name.encode() + np.ascontiguousarray(keys[name]).tobytes())
        for label in () if marks[name] is None else marks[name]:
            content.update(label.encode() + b"\0")
    told = {key: value for key, value in asdict(options).items() if key not in ("tokenizer", "classes")}
    facts = [VERSION, content.hexdigest(), told, task, classes, home.digest(), [table.columns.__dict__ for table in every]]
    extra = {"decode": _decoder(rows["train"].tokenizer)} if isinstance(rows["train"], Texts | Windows) else {}
    return {**rows, "fingerprint": hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest(), **extra}


Make = Callable[[str, np.ndarray], Rows]


def _maker(
    every: list[Table], options: Options, task: str | None, home: Home, where: str
) -> tuple[Make, tuple[str, ...] | None, list[str]]:
    """What makes a split of its rows; the classes' names; notes."""
    columns = every[0].columns
    if task in LANGUAGE:
        return _windows(every, options, str(task), home), None, []
    label, classes, notes = _labels(every, options, task, home, where)
    if columns.kind == "image":
        processor = home.processor("image")
        grey = getattr(home.config, "num_channels", 3) == 1
        return lambda name, places: Pictures(every, places, label, processor, grey), classes, notes
    if columns.kind == "audio":
        extractor = home.processor("audio")
        seconds = options.length or SECONDS
        notes.append(f"data: recordings are cut or filled up to {seconds} seconds (length)")
        return lambda name, places: Recordings(every, places, label, extractor, seconds), classes, notes
    tokenizer = home.processor("text")
    length, pad = home.length(options, CUT), home.padding(tokenizer)
    around = tokenizer.num_special_tokens_to_add(pair=len(every[0].columns.inputs) == 2)
    if length <= around:
        raise UsageError(
            f"length is {length} (--length), and the tokenizer puts {around} tokens around a text; "
            f"it must be {around + 1} at least"
        )
    kind = {"token_classification": Tagged, "seq2seq": Answers}.get(task or "", Texts)
    if kind is Tagged and not tokenizer.is_fast:
        raise UsageError(f"{home.folder}: its tokenizer does not say which word a token is of (it is no fast one)")
    return lambda name, places: kind(every, places, label, tokenizer, length, pad), classes, notes


def _windows(every: list[Table], options: Options, task: str, home: Home) -> Make:
    tokenizer = home.processor("text")
    length = home.length(options, WINDOW)
    if length < 2:
        raise UsageError(f"length is {length} (--length); a window needs 2 tokens at least")
    stride = length if options.stride is None else options.stride
    if stride > length:
        raise UsageError(
            f"stride is {stride} (--stride), above the {length} tokens of a window, so that tokens would be left out"
        )
    plain = all(Path(table.said).suffix == ".txt" for table in every)
    ends = tokenizer.eos_token_id is not None or tokenizer.sep_token_id is not None
    join = options.join if options.join is not None else "" if plain else EOS if ends else "\n\n"
    pad = home.padding(tokenizer)
    if task == "masked_lm":
        return lambda name, places: MaskedWindows(every, places, tokenizer, length, stride, pad, join, name, seed=options.seed)
    return lambda name, places: Windows(every, places, tokenizer, length, stride, pad, join, name)


def _labels(
    every: list[Table], options: Options, task: str | None, home: Home, where: str
) -> tuple[Callable[[Any, str], Any] | None, tuple[str, ...] | None, list[str]]:
    """What a parsed label becomes, the classes' names, and how they came by their order."""
    columns = every[0].columns
    if not columns.labels or task == "seq2seq":
        return None, None, []
    distinct = of_labels.parsed(one for table in every for one in _distinct(table))
    kind = {
        "classification": "classes", "token_classification": "tags", "multi_label": "several", "regression": "numbers",
        "binary": "classes",
    }.get(task or "") or of_labels.kind_of(distinct)  # fmt: skip
    config = of_labels.config_of(home.config)
    if kind == "numbers":
        for one in distinct:
            of_labels.numbers(one, where)
        if len({len(one) if isinstance(one, list) else 1 for one in distinct}) > 1:
            raise UsageError(f"{where}: labels have different numbers of values")
        return of_labels.numbers, None, []
    if kind == "several" and len(columns.labels) > 1:
        names = of_labels.Classes(columns.labels, "a column each")
        if config.count not in (None, len(names.names)):
            raise UsageError(f"{where}: label names {len(names.names)} columns, config.json has num_labels {config.count}")
    else:
        flat = [one for label in distinct for one in (label if isinstance(label, list) else [label])]
        if kind == "classes" and any(isinstance(one, list) for one in distinct):
            raise UsageError(f"{where}: a label is a list; name the task (multi_label or token_classification)")
        if task == "binary":
            config = of_labels.Config(2, config.names)
        names = of_labels.classes_of(flat, config, options.classes, every[0].names, where)
    shown = ", ".join(f"{name}={index}" for index, name in enumerate(names.names[: of_labels.SHOWN]))
    notes = [f"data: classes {shown}{', …' if len(names.names) > of_labels.SHOWN else ''} ({names.note})"] if names.note else []
    if kind == "several":
        return lambda label, at: of_labels.several(label, names, columns.labels, at), names.names, notes
    if kind == "tags":
        return lambda label, at: [names.index(one, at) for one in label], names.names, notes
    return lambda label, at: np.int64(names.index(label, at)), names.names, notes


def _distinct(table: Table) -> list[str]:
    found: list[str] = table.data.unique("label")
    return found


def _decoder(tokenizer: Any) -> Callable[[list[int]], list[str]]:
    """What shows tokens: a list of numbers -> one text each."""

    def decode(tokens: list[int]) -> list[str]:
        return [str(tokenizer.decode([token])) for token in tokens]

    return decode
