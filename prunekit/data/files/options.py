"""How data in files are to be read: the keys of a recipe's ``data`` section beside ``files``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunekit.imports import IMPORT_PATH

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Of files that hold rows."""
HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
"""What the name of a data set on the Hugging Face hub looks like."""
ON_HUB = "hf://datasets/"
"""How the address of such a data set begins."""
SPLIT_NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test", "testing": "test", "scoring": "scoring",
}  # fmt: skip
"""What splits are called elsewhere -> what they are called here."""


@dataclass(frozen=True)
class Options:
    """How files become samples.

    Attributes:
        text: the column of the text; two of them where a sample is a pair of texts. Of seq2seq the source.
        label: the column of the label; several where each is a label (multi_label) or a number (regression). Of seq2seq the
            answer.
        image, audio: the column of pictures or recordings, where the data are no folder of them.
        length: the most tokens of a sample: longer texts are cut; of language models the tokens of a window.
        stride: tokens between the beginnings of two windows; ``length`` by default.
        join: what stands between two texts of a language model: ``eos``, the tokenizer's token, or a text.
        skip_bad: leaves out broken rows, and says how many, instead of refusing the file.
        tokenizer: the folder of a tokenizer or processor, where the model's folder has none.
        validation, test: the shares of the rows that these splits get where they are made.
        scoring: how many training rows become scoring samples; by default a tenth of them, 512 at most.
        seed: of the splits and of the masks of masked language models.
        classes: the classes' names in the order of their indices, where the model's config does not say them.
        subset: of a data set on the hub, the configuration.
    """

    text: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    image: str | None = None
    audio: str | None = None
    length: int | None = None
    stride: int | None = None
    join: str | None = None
    skip_bad: bool = False
    tokenizer: str | None = None
    validation: float = 0.1
    test: float = 0.1
    scoring: int | None = None
    seed: int = 0
    classes: tuple[str, ...] | None = None
    subset: str | None = None


def placed(files: str, folder: Path) -> str:
    """The absolute path of what ``files`` names as seen from ``folder``; of a data set on the hub its address."""
    path = os.path.join(folder.absolute(), os.path.expanduser(files))
    if files.startswith(ON_HUB):
        return files
    return f"{ON_HUB}{files}" if not os.path.lexists(path) and is_hub_name(files) else os.path.normpath(path)


def every_placed(files: str | Mapping[str, str], folder: Path) -> str | dict[str, str]:
    """``placed`` of one, or of a mapping of splits."""
    return placed(files, folder) if isinstance(files, str) else {name: placed(one, folder) for name, one in files.items()}


def names_files(text: str) -> bool:
    """Whether what names data means files, and not a factory's import path."""
    return os.path.lexists(os.path.expanduser(text)) or re.fullmatch(IMPORT_PATH, text) is None


def is_hub_name(text: str) -> bool:
    """Whether a text that is no path here can be the name of a data set on the hub."""
    return HUB.fullmatch(text) is not None and not text.lower().endswith(ENDINGS)
