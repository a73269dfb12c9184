"""Which tokens of a tokenizer.json must stay so that texts keep their tokens, and the file with these alone.

A text keeps its tokens where all of them stay. Byte-pair encoding applies the merge of lowest rank again and again: each token
that it makes on the way is a part of one that it ends with, so these parts and the merges that make them stay, in their order.
WordPiece takes the longest entry that fits, and Unigram the pieces with the highest sum: among fewer entries both find the same
ones. Single characters and bytes stay, so that other texts still have tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prunekit import bounded
from prunekit.errors import ArtifactError, UsageError, quoted

KINDS = ("BPE", "WordPiece", "Unigram")
Places = Mapping[int, int]
"""Number of a token that stays -> its new number."""


def read(path: Path) -> dict[str, Any]:
    """A tokenizer.json of a kind whose tokens can go.

    Raises:
        ArtifactError: it is broken.
        UsageError: it is missing or of another kind.
    """
    if not path.is_file():
        raise UsageError(f"{path}: not there; used_tokens cuts a tokenizer.json; save a fast tokenizer there")
    try:
        content = bounded.parsed(bounded.text(path, bounded.JSON))
        kind, dropout = content["model"].get("type"), content["model"].get("dropout")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a readable tokenizer.json ({quoted(error)})") from None
    if kind not in KINDS:
        raise UsageError(f"{path}: its model is {kind}; used_tokens takes tokens out of {', '.join(KINDS)}")
    if dropout:
        raise UsageError(f"{path}: its dropout is {dropout}, so a text has other tokens each time; used_tokens needs 0")
    found: dict[str, Any] = content
    return found


def numbers(content: Mapping[str, Any]) -> dict[str, int]:
    """Every token's number."""
    vocabulary = content["model"]["vocab"]
    own = {piece: number for number, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)
    return own | {added["content"]: added["id"] for added in content.get("added_tokens") or []}


def staying(content: Mapping[str, Any], used: Iterable[int]) -> set[int]:
    """Numbers of the tokens that stay: those used, special and added ones, single characters and bytes, and the parts of all."""
    model, every = content["model"], numbers(content)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    wanted = set(used)
    kept = {token for token, number in every.items() if number in wanted or _single(token, prefix, suffix)}
    kept |= {added["content"] for added in content.get("added_tokens") or []} | {model.get("unk_token")} & set(every)
    if model["type"] == "Unigram":
        pieces = model["vocab"]
        if pieces:  # what an unknown character costs is reckoned from the least likely piece
            kept.add(min(pieces, key=lambda piece: piece[1])[0])
        if model.get("unk_id") is not None:
            kept.add(pieces[model["unk_id"]][0])
    if model["type"] == "BPE":
        parts: dict[str, list[tuple[str, str]]] = {}
        for left, right in _merges(model):
            parts.setdefault(_joined(left, right, prefix), []).append((left, right))
        open_ones = list(kept)
        while open_ones:
            new = {part for pair in parts.get(open_ones.pop(), ()) for part in pair} - kept
            kept |= new
            open_ones += new
    return {every[token] for token in kept}


def smaller(content: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """The file with the tokens of ``places`` alone, under their new numbers."""
    new = copy.deepcopy(dict(content))
    model = new["model"]
    if isinstance(model["vocab"], list):
        if model.get("unk_id") is not None:
            model["unk_id"] = places[model["unk_id"]]
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in places]
    else:
        model["vocab"] = {token: places[number] for token, number in model["vocab"].items() if number in places}
    if model["type"] == "BPE":
        prefix, left = model.get("continuing_subword_prefix") or "", model["vocab"]
        pairs = list(zip(model["merges"], _merges(model), strict=True))
        model["merges"] = [merge for merge, pair in pairs if _joined(*pair, prefix) in left]
    for added in new.get("added_tokens") or []:
        added["id"] = places[added["id"]]
    if new.get("padding"):
        new["padding"]["pad_id"] = places[new["padding"]["pad_id"]]
    for step in _steps(new.get("post_processor")):
        for special in (step.get("special_tokens") or {}).values():
            special["ids"] = [places[number] for number in special["ids"]]
        for name in ("sep", "cls"):
            if name in step:
                step[name] = [step[name][0], places[step[name][1]]]
    return new


def _single(token: str, prefix: str, suffix: str) -> bool:
    """Whether it is one character, inside a word or at its end too, or one byte."""
    bare = token.removeprefix(prefix) if prefix else token
    bare = bare.removesuffix(suffix) if suffix else bare
    return len(bare) <= 1 or len(token) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _joined(left: str, right: str, prefix: str) -> str:
    return left + (right.removeprefix(prefix) if prefix else right)


def _steps(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A post-processor and those inside it."""
    if processor is not None:
        yield processor
        for inner in processor.get("processors") or ():
            yield from _steps(inner)
