"""Text of samples: tokens with what each was moved by, as values of JSON; what pictures are for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from prunekit.errors import visible
from prunekit.explain.tokens import Reading

LONGEST = 512  # tokens of a sample that a page shows

Decode = Callable[[Sequence[int]], Sequence[str]]
"""Token numbers to their texts, one a token."""


class Passage(TypedDict):
    """A text in tokens: ``(text, value, strength)``, with a value where there is one and its strength from -1 to 1."""

    caption: str
    tokens: list[tuple[str, float | None, float]]


def passage(caption: str, texts: Sequence[str], values: Sequence[float | None] | None = None) -> Passage:
    """A text to show; strengths are parts of the largest value."""
    values = [None] * len(texts) if values is None else values
    largest = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    shown = [(t, v, 0.0 if v is None else round(v / largest, 3)) for t, v in zip(texts, values, strict=True)]
    left = len(shown) - LONGEST
    return {"caption": caption, "tokens": shown[:LONGEST] + ([(f" … {left} more", None, 0.0)] if left > 0 else [])}


def texts_of(found: Reading | Sequence[int], decode: Decode | None) -> list[str]:
    """The text of every token, with what a terminal would obey written out; without ``decode`` its number."""
    tokens = found.tokens if isinstance(found, Reading) else list(found)
    return [f"{token} " for token in tokens] if decode is None else [visible(str(text)) for text in decode(tokens)]
