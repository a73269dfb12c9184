"""Perplexity as the papers on pruning language models measure it, and what they published.

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), Wanda (Sun et al. 2023, arXiv 2306.11695) and those after them share one
protocol for WikiText2's raw test set:

1. The set's rows are joined by two newlines (a row ends with one of its own) and tokenized at once, so that what the tokenizer
   puts in front of a text (``<s>``, ``</s>``) stands there once.
2. Windows of ``length`` tokens follow one another without overlap; what is left at the end is dropped.
3. Every window is read alone. Each of its tokens but the first is predicted, ``length - 1`` of them.
4. Perplexity is ``exp(Σ_w nll_w / (windows · length))``, where ``nll_w`` is the mean of the window's ``length - 1`` negative
   log-likelihoods, multiplied by ``length``. All windows predict as many tokens, so the ``length`` cancels, and it is the
   exponential of the mean over all predicted tokens: what ``prunekit eval`` calls perplexity.

Calibration is theirs too: of documents (C4) one after another is drawn until one is longer than a window, and of it a window at a
random place; of one text (a .txt file) windows at random places. Python's ``random`` with seed 0 draws, as in their code.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.bounded import size
from prunekit.errors import ArtifactError, UsageError
from prunekit.imports import needed

BETWEEN = "\n\n"
USUAL = 2048
"""Tokens of a window where nobody says how many, or the model's positions where these are fewer."""


@dataclass(frozen=True)
class Published:
    """A model's published perplexities on WikiText2, by method and amount (``0.5``, ``2:4``; ``""`` of the dense model).

    It is known by its config: architecture, hidden size, layers, vocabulary and positions.
    """

    name: str
    config: tuple[str, int, int, int, int]
    length: int
    figures: Mapping[tuple[str, str], float]


KNOWN = (
    Published("OPT-125M", ("OPTForCausalLM", 768, 12, 50272, 2048), 2048, {("dense", ""): 27.66}),
    Published("OPT-1.3B", ("OPTForCausalLM", 2048, 24, 50272, 2048), 2048, {("dense", ""): 14.62, ("sparsegpt", "0.5"): 17.46}),
    Published(
        "LLaMA-2-7B",
        ("LlamaForCausalLM", 4096, 32, 32000, 4096),
        4096,
        {
            ("dense", ""): 5.12,
            ("magnitude", "0.5"): 14.89,
            ("sparsegpt", "0.5"): 6.51,
            ("wanda", "0.5"): 6.42,
            ("magnitude", "2:4"): 54.59,
            ("sparsegpt", "2:4"): 10.17,
            ("wanda", "2:4"): 11.02,
            ("maskllm", "2:4"): 6.78,
        },
    ),
)


def published(config: Any) -> Published | None:
    """The known model of a config, None where it is none of them."""
    named = (getattr(config, "architectures", None) or [""])[0]
    sizes = (getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"))
    found = (named, *sizes)
    return next((one for one in KNOWN if one.config == found), None)


def window_length(asked: int | None, positions: int | None, known: Published | None) -> int:
    """Tokens of a window.

    Raises:
        UsageError: more than the model has positions, or fewer than 2.
    """
    if asked is None:
        asked = known.length if known is not None else min(USUAL, positions or USUAL)
    if asked < 2 or (positions is not None and asked > positions):
        raise UsageError(f"--length is {asked}; a window has 2 tokens at least, and the model's {positions} positions at most")
    return asked


def joined_text(path: Path, joined: bool = False) -> str:
    """The text of a test set as the papers have it.

    Args:
        path: ``.txt`` or ``.raw``, as WikiText's ``wiki.test.raw``: every line is a row, with its end, and a blank one an empty
            row; ``.jsonl``, ``.json`` (lines), each also with ``.gz``, or ``.parquet``: rows of a column ``text``.
        joined: the file holds the rows joined already.
    """
    if joined:
        return _plain(path)
    return BETWEEN.join(_rows(path))


def following_windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """Windows ``(windows, length)``.

    Raises:
        UsageError: the text is shorter than one window.
    """
    tokens = _tokens(tokenizer, text)
    count = len(tokens) // length
    if not count:
        raise UsageError(f"--text has {len(tokens)} tokens, fewer than a window's {length}; give a longer text, or --length")
    return tokens[: count * length].view(count, length)


def calibration_windows(tokenizer: Any, path: Path, length: int, count: int, seed: int = 0) -> Tensor:
    """Windows ``(count, length)`` to prune by.

    Raises:
        UsageError: no document is longer than a window.
    """
    draw = random.Random(seed)
    if _kind(path) in (".txt", ".raw"):
        tokens = _tokens(tokenizer, joined_text(path))
        if len(tokens) <= length:
            raise UsageError(f"{path}: has {len(tokens)} tokens; calibration windows of {length} need more")
        return torch.stack([_window(tokens, length, draw) for _ in range(count)])
    documents, found, short = list(_rows(path)), [], set()
    while len(found) < count:
        chosen = draw.randint(0, len(documents) - 1)
        tokens = _tokens(tokenizer, documents[chosen])
        if len(tokens) > length:
            found.append(_window(tokens, length, draw))
            continue
        short.add(chosen)
        if len(short) == len(documents):
            raise UsageError(f"{path}: none of its {len(documents)} texts is longer than a window of {length} tokens")
    return torch.stack(found)


def _window(tokens: Tensor, length: int, draw: random.Random) -> Tensor:
    begin = draw.randint(0, len(tokens) - length - 1)
    return tokens[begin : begin + length]


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _kind(path: Path) -> str:
    """The file's ending, without ``.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _plain(path: Path) -> str:
    size(path)
    raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not text in UTF-8 (byte {error.start + 1})") from None


def _rows(path: Path) -> Iterator[str]:
    """The rows of a file."""
    kind = _kind(path)
    if kind in (".txt", ".raw"):
        *lines, last = _plain(path).split("\n")
        yield from (f"{line}\n" if line.strip() else "" for line in lines)
        yield from [last] if last.strip() else []
    elif kind in (".jsonl", ".json"):
        for number, line in enumerate(_plain(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, LookupError, TypeError):
                raise ArtifactError(f"{path}: line {number} is no JSON mapping with a text") from None
    elif kind == ".parquet":
        size(path)
        needed("datasets")  # which brings pyarrow
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        if "text" not in table.column_names:
            raise ArtifactError(f"{path}: has the columns {', '.join(table.column_names)}, and none called text")
        yield from map(str, table["text"].to_pylist())
    else:
        raise UsageError(f"{path}: ends in {kind or 'nothing'}; give .txt, .raw, .jsonl, .json or .parquet")
