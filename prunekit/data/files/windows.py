"""Texts of a language model, packed into windows; which tokens of a window count.

The texts of a split follow each other in their order, each ended by ``join``; they are tokenized one by one without the tokens
that a tokenizer puts around a text, and their tokens are one row of ``N``. Window ``k`` is tokens ``k·stride`` to ``k·stride +
length``; the last one is what is left, filled up. Of the first window every token counts that has one before it; of a later one
those that no window before has asked for, so with ``stride = length`` all but its first. Where ``stride`` is smaller, each token
but the very first counts once, and but for the first window's has at least ``length - stride`` tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from prunekit.data.files.labelled import IGNORED, Item, Rows
from prunekit.data.files.table import Table
from prunekit.errors import UsageError, theirs

EOS = "eos"
MASKED, AS_MASK, AS_OTHER = 0.15, 0.8, 0.1
"""Of the tokens, how many a masked model is asked for; of these, how many are masked, and how many are random ones (BERT)."""


class Windows(Rows):
    """The windows of a split.

    Args:
        join: ``eos``, or the text that ends every text.
    """

    def __init__(
        self, tables: list[Table], places: np.ndarray, tokenizer: Any, length: int, stride: int, pad: int, join: str, name: str
    ) -> None:
        super().__init__(tables, places, None)
        self.tokenizer, self.length, self.stride, self.pad, self.join, self.name = tokenizer, length, stride, pad, join, name
        self._bytes = 0

    def texts(self) -> Iterator[str]:
        """What was tokenized, text by text."""
        after = "" if self.join == EOS else self.join
        return (row["input"] + after for several in self.batches() for row in several)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of the split."""
        end = [self._end()] if self.join == EOS else []
        after = "" if self.join == EOS else self.join
        parts: list[np.ndarray] = []
        kind = np.uint16 if len(self.tokenizer) <= 2**16 else np.int32
        for several in self.batches():
            texts = [row["input"] + after for row in several]
            self._bytes += sum(len(text.encode()) for text in texts)
            with theirs("data: the tokenizer"):
                found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            parts.append(np.fromiter((token for text in found for token in [*text, *end]), kind))
        every = np.concatenate(parts)
        if len(every) < 2:
            raise UsageError(f"data: the {self.name} texts are {len(every)} tokens; a language model needs 2 at least")
        return every

    def _end(self) -> int:
        found = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        if found is None:
            raise UsageError("data: the tokenizer has no end of text; say join, the text that stands between two texts")
        return int(found)

    @property
    def bytes_per_token(self) -> float | None:  # type: ignore[override]
        tokens = len(self.tokens)
        return self._bytes / tokens

    def __len__(self) -> int:
        left = len(self.tokens) - self.length
        count = 1 + max(0, -(-left // self.stride))
        last = len(self.tokens) - (count - 1) * self.stride
        return count - 1 if count > 1 and self.stride == self.length and last < 2 else count  # one token has none before it

    def window(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found: np.ndarray = self.tokens[index * self.stride : index * self.stride + self.length].astype(np.int64)
        return found

    def __getitem__(self, index: int) -> Item:
        part = self.window(index)
        labels = part.copy()
        if index:
            labels[: self.length - self.stride] = IGNORED
        return self.filled_up(part, labels, self.length)

    def filled_up(self, part: np.ndarray, labels: np.ndarray, width: int) -> Item:
        more = width - len(part)
        return {
            "input_ids": np.pad(part, (0, more), constant_values=self.pad),
            "attention_mask": (np.arange(width) < len(part)).astype(np.int64),
            "labels": np.pad(labels, (0, more), constant_values=IGNORED),
        }


class MaskedWindows(Windows):
    """Windows between the tokens that the tokenizer puts around a text, with 15 % of their tokens asked for, the same every time.

    Of those 80 % are masked, 10 % another token, 10 % as they are (Devlin et al. 2019).
    """

    def __init__(self, *given: Any, seed: int = 0) -> None:
        super().__init__(*given)
        self.seed = seed
        around = [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]
        self.before = [] if around[0] is None else [around[0]]
        self.after = [] if around[1] is None else [around[1]]
        self.whole = self.length
        self.length -= len(self.before) + len(self.after)
        self.stride = min(self.stride, self.length)
        if self.length < 2:
            raise UsageError(f"length is {self.whole} (--length); a window of a masked language model needs 4 at least")
        if self.tokenizer.mask_token_id is None:
            raise UsageError("data: the tokenizer has no mask token, so its model is no masked language model")

    def __getitem__(self, index: int) -> Item:
        part = self.window(index)
        random = np.random.default_rng([self.seed, sum(map(ord, self.name)), index])
        asked = random.random(len(part)) < MASKED
        asked[random.integers(len(part))] |= not asked.any()
        how = random.random(len(part))
        labels = np.where(asked, part, IGNORED)
        shown = np.where(asked & (how < AS_MASK), self.tokenizer.mask_token_id, part)
        other = random.integers(len(self.tokenizer), size=len(part))
        shown = np.where(asked & (how >= AS_MASK) & (how < AS_MASK + AS_OTHER), other, shown)
        none = np.full(1, IGNORED)
        shown = np.concatenate([self.before, shown, self.after]).astype(np.int64)
        labels = np.concatenate([none[: len(self.before)], labels, none[: len(self.after)]]).astype(np.int64)
        return self.filled_up(shown, labels, self.whole)
