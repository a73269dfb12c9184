"""Text of samples: tokens with what each was moved by, as values of JSON; what pictures are for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from prunekit.errors import visible
from prunekit.explain.tokens import Reading

LONGEST = 512  # tokens of a sample that a page shows

Decode = Callable[[Sequence[int]], Sequence[str]]
"""Token numbers to their texts, one a token."""


class ShownToken(TypedDict):
    """A token's text, its value where there is one, and how strong that is, from -1 to 1."""

    text: str
    value: float | None
    strength: float


class Passage(TypedDict):
    """A text in tokens, with a caption."""

    caption: str
    tokens: list[ShownToken]


def passage(caption: str, texts: Sequence[str], values: Sequence[float | None] | None = None) -> Passage:
    """A text to show; strengths are parts of the largest value."""
    values = [None] * len(texts) if values is None else values
    largest = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    shown: list[ShownToken] = [
        {"text": text, "value": value, "strength": 0.0 if value is None else round(value / largest, 3)}
        for text, value in zip(texts, values, strict=True)
    ]
    if (left := len(shown) - LONGEST) > 0:
        shown[LONGEST:] = [{"text": f" … {left} more tokens", "value": None, "strength": 0.0}]
    return {"caption": caption, "tokens": shown}


def texts_of(found: Reading | Sequence[int], decode: Decode | None) -> list[str]:
    """The text of every token, with what a terminal would obey written out; without ``decode`` its number."""
    tokens = found.tokens if isinstance(found, Reading) else list(found)
    return [f"{token} " for token in tokens] if decode is None else [visible(str(text)) for text in decode(tokens)]
