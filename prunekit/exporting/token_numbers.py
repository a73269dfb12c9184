"""Where numbers of tokens stand: in a model's inputs, and in configs (the first token, padding, the end)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit import batch
from prunekit.batch import Inputs
from prunekit.errors import UsageError

TOKENS = ("input_ids", "decoder_input_ids", "labels")
"""Arguments that hold numbers of tokens."""
LISTS = ("suppress_tokens", "begin_suppress_tokens")
UNREADABLE = (
    "forced_decoder_ids", "bad_words_ids", "force_words_ids", "sequence_bias", "lang_to_id", "task_to_id", "image_token_index",
    "audio_token_index", "video_token_index",
)  # fmt: skip
"""Keys of configs that hold numbers of tokens in other ways than one or a list."""


def token_tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors of tokens among a model's inputs.

    Raises:
        UsageError: there are none.
    """
    if isinstance(inputs, Mapping):
        found = [inputs[name] for name in TOKENS if isinstance(inputs.get(name), Tensor)]
    else:
        found = [inputs if isinstance(inputs, Tensor) else inputs[0]]
    if not found or any(each.is_floating_point() for each in found):
        raise UsageError(f"used_tokens: a batch's inputs are {batch.described(inputs)}; there are no input_ids among them")
    return found


def ids_in(part: Mapping[str, Any]) -> Iterator[int]:
    """Numbers of tokens in a config.

    Raises:
        UsageError: it says some in a way that is not known here.
    """
    for name, value in part.items():
        if name in UNREADABLE and value:
            raise UsageError(f"used_tokens: the model's config says {name}, whose tokens prunekit does not renumber")
        if name.endswith("token_id") or name in LISTS:
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


def renumbered(part: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """The same keys; what is no token of the model (-1, None) stays."""
    new = dict(part)
    for name, value in part.items():
        if name.endswith("token_id") or name in LISTS:
            new[name] = [places.get(one, one) for one in value] if isinstance(value, list) else places.get(value, value)
    return new


def write_mapping(path: Path, content: Mapping[str, Any]) -> None:
    """Writes such a file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
