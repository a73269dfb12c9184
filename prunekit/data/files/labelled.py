"""Samples that are a row each: a text, a pair, words, a picture or a recording, with its label."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prunekit import bounded
from prunekit.data.files.table import Table
from prunekit.errors import ArtifactError, UsageError, quoted, theirs
from prunekit.imports import needed

BATCH = 512  # texts that are tokenized at once
IGNORED = -100
MULTIPLE = 8  # a split's width in tokens is a multiple of it, or the most that is allowed
MOST_PIXELS = 100_000_000
Item = dict[str, Any]
LabelOf = Callable[[Any, str], Any]


class Rows:
    """One split's rows by index, as mappings of the model's arguments with ``labels``; see ``prunekit.data.Split``.

    Args:
        tables: of all given splits.
        places: which row of which table every sample is, ``(samples, 2)``; one table.
        label: what a parsed label becomes: an array of fixed shape.
    """

    filled = True
    """It has samples, which is known without counting them."""
    classes: tuple[str, ...] | None = None
    bytes_per_token: float | None = None

    def __init__(self, tables: list[Table], places: np.ndarray, label: LabelOf | None) -> None:
        self.tables, self.places, self.label = tables, places, label
        self.said: list[str] = []

    def __len__(self) -> int:
        return len(self.places)

    @property
    def notes(self) -> list[str]:
        """What the user should know of these samples."""
        return self.said

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        """A sample's row of its table, and what it is called in messages."""
        table, row = self.places[index]
        return self.tables[table].data[int(row)], f"{self.tables[table].said}: row {int(row) + 1}"

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """All rows, ``BATCH`` at a time: a table gives many at once as fast as one."""
        for begin in range(0, len(self.places), BATCH):
            part = self.places[begin : begin + BATCH]
            table = self.tables[int(part[0, 0])]  # a split's rows come out of one table
            columns = table.data[part[:, 1].tolist()]
            yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def labels_of(self, row: dict[str, Any], where: str) -> Item:
        if self.label is None:
            return {}
        return {"labels": self.label(json.loads(row["label"]), where)}


class Texts(Rows):
    """Texts and pairs, tokenized once when a split is first looked at, and kept as small numbers; padded to the longest.

    Args:
        tokenizer: of transformers.
        length: tokens after which a text is cut.
        pad: the token that fills up.
    """

    def __init__(
        self, tables: list[Table], places: np.ndarray, label: LabelOf | None, tokenizer: Any, length: int, pad: int
    ) -> None:
        super().__init__(tables, places, label)
        self.tokenizer, self.length, self.pad = tokenizer, length, pad

    def texts(self) -> Iterator[str]:
        """What was tokenized; of pairs one after the other."""
        for several in self.batches():
            yield from (row[name] for row in several for name in ("input", "second") if row.get(name) is not None)

    @cached_property
    def _encoded(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Argument -> the tokens of all texts in one array, and where each begins."""
        found: dict[str, list[list[int]]] = {}
        self._cut = 0
        for several in self.batches():
            for name, values in self.tokenized(several).items():
                found.setdefault(name, []).extend(values)
        return {name: _packed(values) for name, values in found.items()}

    def tokenized(self, several: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
        """The arguments of some rows, each a list of numbers a row, without the mask."""
        pairs = {"text_pair": [row["second"] for row in several]} if several[0].get("second") is not None else {}
        with theirs("data: the tokenizer"):
            whole = self.tokenizer(
                [row["input"] for row in several], **pairs, truncation=True, max_length=self.length,
                return_attention_mask=False, return_overflowing_tokens=self.tokenizer.is_fast and not pairs,
            )  # fmt: skip
        kept = np.arange(len(several))
        if (which := whole.get("overflow_to_sample_mapping")) is not None:
            first = np.unique(np.array(which), return_index=True)[1]
            self._cut += len(np.unique(np.array(which)[np.setdiff1d(np.arange(len(which)), first)]))
            kept = first
        names = [name for name in whole if name != "overflow_to_sample_mapping"]
        return {name: [whole[name][int(row)] for row in kept] for name in names}

    @cached_property
    def width(self) -> int:
        """Tokens of every sample, padding with it."""
        starts = self._encoded["input_ids"][1]
        return min(self.length, -(-int(np.diff(starts).max()) // MULTIPLE) * MULTIPLE)

    @property
    def notes(self) -> list[str]:
        _ = self._encoded
        cut = f"data: {self._cut:,} of {len(self):,} texts are longer than {self.length} tokens (length) and cut"
        return [*self.said, *([cut] if self._cut else [])]

    def __getitem__(self, index: int) -> Item:
        found: Item = {}
        for name, (flat, starts) in self._encoded.items():
            if name == "labels":
                continue
            part = flat[starts[index] : starts[index + 1]].astype(np.int64)
            fill = self.pad if name == "input_ids" else 0
            found[name] = np.pad(part, (0, self.width - len(part)), constant_values=fill)
            if name == "input_ids":
                found["attention_mask"] = (np.arange(self.width) < len(part)).astype(np.int64)
        return {**found, **self.labels(index)}

    def labels(self, index: int) -> Item:
        if self.label is None:
            return {}
        return self.labels_of(*self.row(index))


class Tagged(Texts):
    """Words with a tag each: a word's first piece has its tag, other pieces and what the tokenizer adds do not count."""

    def texts(self) -> Iterator[str]:
        """The words one by one."""
        for several in self.batches():
            yield from (word for row in several for word in json.loads(row["input"]))

    def tokenized(self, several: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
        assert self.label is not None
        words = [json.loads(row["input"]) for row in several]
        with theirs("data: the tokenizer"):
            whole = self.tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=self.length, return_attention_mask=False
            )
        labels = []
        for number, row in enumerate(several):
            tags, said, before = self.label(json.loads(row["label"]), "data"), [], None
            which = whole.word_ids(number)
            for word in which:
                said.append(IGNORED if word is None or word == before else int(tags[word]))
                before = word
            labels.append(said)
            self._cut += max((word for word in which if word is not None), default=-1) + 1 < len(tags)
        return {**{name: whole[name] for name in whole}, "labels": labels}

    def labels(self, index: int) -> Item:
        flat, starts = self._encoded["labels"]
        part = flat[starts[index] : starts[index + 1]].astype(np.int64)
        return {"labels": np.pad(part, (0, self.width - len(part)), constant_values=IGNORED)}


class Answers(Texts):
    """Texts with a text for an answer, whose tokens are the labels."""

    def texts(self) -> Iterator[str]:
        """The texts, then their answers."""
        yield from super().texts()
        yield from (json.loads(row["label"]) for several in self.batches() for row in several)

    @cached_property
    def _answers(self) -> tuple[np.ndarray, np.ndarray]:
        found: list[list[int]] = []
        count = 0
        for several in self.batches():
            texts = [json.loads(row["label"]) for row in several]
            count += sum(len(text.encode()) for text in texts)
            with theirs("data: the tokenizer"):
                found += self.tokenizer(text_target=texts, truncation=True, max_length=self.length)["input_ids"]
        self._bytes = count
        return _packed(found)

    @property
    def bytes_per_token(self) -> float | None:  # type: ignore[override]
        flat, _ = self._answers
        return self._bytes / max(1, len(flat))

    def labels(self, index: int) -> Item:
        flat, starts = self._answers
        width = int(np.diff(starts).max())
        part = flat[starts[index] : starts[index + 1]].astype(np.int64)
        return {"labels": np.pad(part, (0, width - len(part)), constant_values=IGNORED)}


class Pictures(Rows):
    """Pictures, read and made into pixels by the model's image processor whenever they are looked at."""

    def __init__(self, tables: list[Table], places: np.ndarray, label: LabelOf | None, processor: Any, grey: bool) -> None:
        super().__init__(tables, places, label)
        self.processor, self.mode = processor, "L" if grey else "RGB"

    def __getitem__(self, index: int) -> Item:
        needed("PIL")
        from PIL import Image, UnidentifiedImageError

        row, where = self.row(index)
        where = row["input"] or where
        try:
            with Image.open(_content(row)) as found:
                if found.width * found.height > MOST_PIXELS:
                    raise UsageError(f"{where}: has {found.width:,} × {found.height:,} pixels; {MOST_PIXELS:,} at most are read")
                picture = found.convert(self.mode)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ArtifactError(f"{where}: not a whole picture ({quoted(error, 80)})") from None
        with theirs(f"{where}: the image processor"):
            made = self.processor(images=picture, return_tensors="np")
        return {**{name: np.asarray(values)[0] for name, values in made.items()}, **self.labels_of(row, where)}


class Recordings(Rows):
    """Recordings, one channel at the extractor's rate, cut or filled up to one length."""

    def __init__(self, tables: list[Table], places: np.ndarray, label: LabelOf | None, extractor: Any, seconds: float) -> None:
        super().__init__(tables, places, label)
        self.extractor, self.rate = extractor, int(extractor.sampling_rate)
        self.most = int(seconds * self.rate)

    def __getitem__(self, index: int) -> Item:
        row, where = self.row(index)
        where = row["input"] or where
        sound = needed("soundfile")
        try:
            values, rate = sound.read(_content(row), dtype="float32", always_2d=True)
        except (sound.LibsndfileError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{where}: not a whole recording ({quoted(error, 80)})") from None
        values = values.mean(1)
        if rate != self.rate:
            values = needed("scipy.signal").resample_poly(values, self.rate, rate).astype(np.float32)
        with theirs(f"{where}: the feature extractor"):
            made = self.extractor(
                values[: self.most], sampling_rate=self.rate, padding="max_length", max_length=self.most, truncation=True,
                return_tensors="np",
            )  # fmt: skip
        return {**{name: np.asarray(found)[0] for name, found in made.items()}, **self.labels_of(row, where)}


def _content(row: dict[str, Any]) -> io.BytesIO:
    if row["bytes"] is not None:
        return io.BytesIO(row["bytes"])
    path = Path(row["input"])
    bounded.size(path)
    with bounded.opened(path) as file:
        return io.BytesIO(file.read())


def _packed(values: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All numbers in one array of the smallest fitting type, and where each list begins, ``(lists + 1,)``."""
    starts = np.cumsum([0, *map(len, values)])
    flat = np.fromiter((one for part in values for one in part), np.int32, int(starts[-1]))
    small = len(flat) and flat.min() >= -(2**15) and flat.max() < 2**15
    return (flat.astype(np.int16) if small else flat), starts
