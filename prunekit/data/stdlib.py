"""The source code of Python's standard library, which every machine has, as windows of tokens for language models."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import UsageError
from prunekit.imports import needed

HELD = {"test": 26, "validation": 52}
"""A file whose hash begins with a smaller byte is held out: a tenth of all files each."""
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
"""Folders that are no part of the library, are not there everywhere, or hold tables that a program wrote."""
BYTES = 256
END = "<|end|>"  # stands after every file


def stdlib(
    length: int = 128,
    vocabulary: int = 2048,
    train: int = 16000,
    validation: int = 128,
    test: int = 1000,
    scoring: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Windows of ``length`` tokens, each with the tokens one place on: ``(samples, length)`` int64 both; for the task causal_lm.

    A hash of its path puts a file into training, validation or test; files follow one another in the order of their hashes, each
    with an end, and windows follow one another without overlap, so that every token is asked for once. Scoring windows are dealt
    out among the training files' and are none of the training windows. The tokens are those of a byte-level BPE (Sennrich et al.
    2016; bytes as in GPT-2) that is learnt from the training files alone.

    Args:
        length: tokens of a window.
        vocabulary: tokens of the BPE: 256 bytes, the end of a file, and merges.
        train, validation, test, scoring: how many windows; those of validation and test are spread over all files of theirs.
        seed: of which file belongs where.

    Returns:
        The splits; ``decode``, the text of every token of a list; ``bytes_per_token`` of the test windows; and ``stride``.

    Raises:
        UsageError: this Python has too little source code for so many windows, a number is too small, or tokenizers is missing.
    """
    asked = {"train": train, "validation": validation, "test": test, "scoring": scoring}
    if min(length, *asked.values()) < 1 or vocabulary <= BYTES:
        told = ", ".join(f"{name} {count}" for name, count in {"length": length, **asked}.items())
        raise UsageError(f"stdlib: {told} must be at least 1 each, and vocabulary {vocabulary} at least {BYTES + 1}")
    tokenizer = _tokenizer(vocabulary, seed)
    found = {}
    for name in HELD:
        windows = _windows(name, tokenizer, length, seed, None)
        found[name] = _spread(windows, asked[name], _enough(name, len(windows), asked[name]))
    most = train + scoring
    windows = _windows("train", tokenizer, length, seed, most)[:most]
    _enough("train and scoring", len(windows), most)
    chosen = torch.arange(scoring) * most // scoring
    rest = torch.ones(most, dtype=torch.bool)
    rest[chosen] = False
    found |= {"train": windows[rest], "scoring": windows[chosen]}
    return {name: (part[:, :-1].contiguous(), part[:, 1:].contiguous()) for name, part in found.items()} | {
        "decode": _decoder(tokenizer),
        "bytes_per_token": _bytes(tokenizer, found["test"][:, 1:]),
        "stride": length,
    }


def _enough(name: str, there: int, asked: int) -> int:
    if there < asked:
        raise UsageError(
            f"stdlib: {name} {asked}: this Python's library has {there} such windows; ask for fewer, or shorter ones"
        )
    return there


def _spread(windows: Tensor, count: int, of: int) -> Tensor:
    """``count`` of the windows, evenly."""
    return windows[torch.arange(count) * of // count]


@cache
def _texts(seed: int) -> dict[str, list[str]]:
    """Every file's text by split, in the order of the paths' hashes."""
    root = Path(sysconfig.get_path("stdlib"))
    placed: list[tuple[bytes, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_READ and not name.startswith("config-")]
        for name in files:
            path = Path(folder, name)
            if path.suffix == ".py" and not name.startswith("_sysconfigdata"):  # which says how this Python was built
                placed.append((hashlib.sha256(f"{seed}/{path.relative_to(root).as_posix()}".encode()).digest(), path))
    found: dict[str, list[str]] = {"test": [], "validation": [], "train": []}
    for digest, path in sorted(placed):
        name = next((held for held, below in HELD.items() if digest[0] < below), "train")
        found[name].append(path.read_bytes().decode("utf-8", "replace"))
    if not all(found.values()):
        raise UsageError(f"stdlib: {root} has {len(placed)} files of source code; this Python's library is not there as text")
    return found


@cache
def _tokenizer(vocabulary: int, seed: int) -> Any:
    """Byte-level BPE of the training files; the same files give the same one."""
    tokenizers = needed("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(_texts(seed)["train"], trainer)
    return made


def _windows(name: str, tokenizer: Any, length: int, seed: int, most: int | None) -> Tensor:
    """Windows ``(windows, length + 1)`` of a split's files in their order, each with its neighbour's first token.

    Args:
        most: where to stop reading; None for all.
    """
    end = tokenizer.token_to_id(END)
    stream: list[int] = []
    for text in _texts(seed)[name]:
        if most is not None and len(stream) > most * length:
            break
        stream += [*tokenizer.encode(text).ids, end]
    count = max(0, len(stream) - 1) // length
    tokens = torch.tensor(stream[: count * length + 1], dtype=torch.int64)
    return tokens.unfold(0, length + 1, length) if count else tokens.new_empty(0, length + 1)


def _bytes(tokenizer: Any, tokens: Tensor) -> float:
    """Bytes of text a token, in the mean; the end of a file is a token without any."""
    vocabulary = range(tokenizer.get_vocab_size())
    sizes = [0 if (text := tokenizer.id_to_token(k)) == END else len(text) for k in vocabulary]  # a letter stands for a byte
    return float(torch.tensor(sizes)[tokens].double().mean())


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    def decode(tokens: Sequence[int]) -> list[str]:
        """The text of each token; of a part of a letter a replacement character."""
        return [str(tokenizer.decode([int(token)], skip_special_tokens=False)) for token in tokens]

    return decode
