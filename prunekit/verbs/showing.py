"""The samples that an explanation shows: images as pictures, text as passages of tokens with what moved each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prunekit.batch import size
from prunekit.data import Split
from prunekit.explain import units_of
from prunekit.explain.answers import FEW, text_of
from prunekit.explain.passages import Decode, Passage, passage, texts_of
from prunekit.explain.pictures import Picture, picture
from prunekit.explain.tokens import reading
from prunekit.task import Task
from prunekit.task.places import LanguageModel
from prunekit.verbs.run_folder import Run

SAID = ("label", "answer", "dense", "pruned", "masked")
SHOWN = 24  # samples of a kind on a page
VALUES = {"log_prob": "log-probability, in nats", "margin": "margin"}


def add_texts(run: Run, result: dict[str, Any]) -> None:
    """Puts the text of tokens, and of the training samples and errors that are named, into an explanation; nothing for images."""
    if not _is_text(run):
        return
    own, train = run.splits[result["split"]], run.splits["train"]
    for side in ("raised", "lowered"):
        _add(train, run.task, result.get("training", {}).get(side, []))
    if result["what"] == "errors":
        _add(own, run.task, result["rows"])
    if result["what"] == "sample":
        found = _texts(own, run.task, [int(result["name"])])
        result["text"] = "".join(found[0]) if found else ""
    numbers = result["chosen"]["indices"] if "chosen" in result else [int(result["name"])] if result["what"] == "sample" else []
    for number, sample in zip(numbers, result.get("tokens", {}).get("samples", []), strict=False):
        sample["index"] = number
        for row, text in zip(sample["rows"], texts_of([r["token"] for r in sample["rows"]], own.decode), strict=True):
            row["text"] = text
    if isinstance(run.task, LanguageModel) and own.decode is not None:
        _read_out(result, own.decode)


def _read_out(nest: Any, decode: Decode) -> None:
    """Labels and answers that are tokens become the beginning of their text, in one quoted line."""
    if isinstance(nest, list):
        for inner in nest:
            _read_out(inner, decode)
    for key, value in nest.items() if isinstance(nest, dict) else ():
        if key in SAID and isinstance(value, list) and all(isinstance(one, int) for one in value):
            tokens = [one for one in value[:FEW] if one >= 0]  # below are those that do not count
            text = "".join(texts_of(tokens, decode)) + ("…" if len(value) > FEW else "")
            nest[key] = json.dumps(text, ensure_ascii=False)
        else:
            _read_out(value, decode)


def pictures_of(run: Run, result: dict[str, Any]) -> dict[str, list[Picture | Passage]]:
    """Samples to show, by place on the page; empty where the data are neither images nor text."""
    train, own = run.splits["train"], run.splits[result["split"]]
    task = run.task if _is_text(run) else None
    found: dict[str, list[Picture | Passage]] = {}
    for side in ("raised", "lowered"):
        rows = result.get("training", {}).get(side, [])
        found[side] = _captioned(train, [(r["index"], _of_training(r, task)) for r in rows], task)
    if result["what"] == "errors":
        rows = result["rows"][:SHOWN]
        captions = [f"{r['index']}: {_answered(r, 'label', 'answer', task)}{r[result['by']]:.3g}" for r in rows]
        found["errors"] = _captioned(own, [(r["index"], caption) for r, caption in zip(rows, captions, strict=True)], task)
    if "chosen" in result:
        found["chosen"] = _captioned(own, [(k, str(k)) for k in result["chosen"]["indices"][:SHOWN]], task)
    if result["what"] == "sample":
        caption = f"label {text_of(result['label'])}" if _labelled(task) else f"{result['split']} sample {result['name']}"
        found["sample"] = _captioned(own, [(int(result["name"]), caption)], task)
    for number, unit in enumerate(units_of(result)):
        found[f"unit {number}"] = _captioned(own, [(r["index"], _of_unit(r, task)) for r in unit["samples"]], task)
    if "changes" in result:
        rows = result["changes"][:SHOWN]
        captions = [f"{r['index']}: {_answered(r, 'dense', 'pruned', task, r['label'])}" for r in rows]
        found["changes"] = _captioned(own, [(r["index"], caption) for r, caption in zip(rows, captions, strict=True)], task)
    found |= _coloured(result)
    return {place: shown for place, shown in found.items() if shown}


def _coloured(result: Mapping[str, Any]) -> dict[str, list[Picture | Passage]]:
    """Text coloured by what training gave each token (``gave``), and by what each pruning took (``pruned NAME``)."""
    account = result.get("tokens")
    if account is None or not account["samples"] or "index" not in account["samples"][0]:
        return {}
    value, found = VALUES[account["of"]], dict[str, list[Picture | Passage]]()
    by = "training" if result["what"] == "sample" else "the part"
    for sample in account["samples"]:
        texts, rows = [row["text"] for row in sample["rows"]], sample["rows"]
        given = [row["gave"] for row in rows]
        said = f"sample {sample['index']}: {by} moved the {value}, by {_sum(given):+.4g} over all tokens"
        found.setdefault("gave", []).append(passage(said, texts, given))
        for name in rows[-1]["pruned"] if rows else ():
            change = [row["pruned"].get(name) for row in rows]
            said = f"sample {sample['index']}: {name} moved the {value}, by {_sum(change):+.4g} over all tokens"
            found.setdefault("pruned", []).append(passage(said, texts, change))
    return found


def _sum(values: Sequence[float | None]) -> float:
    return sum(value for value in values if value is not None)


def _is_text(run: Run) -> bool:
    return run.splits["train"].decode is not None or isinstance(run.task, LanguageModel)


def _labelled(task: Task | None) -> bool:
    """Whether a sample's label says more than its text: not of a language model's."""
    return not isinstance(task, LanguageModel)


def _of_training(row: Mapping[str, Any], task: Task | None) -> str:
    label = f": {text_of(row['label'])}" if _labelled(task) else ""
    return f"{row['index']}{label}\n{row['score']:+.3g}"


def _of_unit(row: Mapping[str, Any], task: Task | None) -> str:
    label = f": {text_of(row['label'])}" if _labelled(task) else ""
    return f"{row['index']}{label}\n{row['blame']:.3g}"


def _answered(row: Mapping[str, Any], first: str, second: str, task: Task | None, label: Any = None) -> str:
    if not _labelled(task):
        return ""
    told = f"{text_of(row[first])} → {text_of(row[second])}"
    return f"{told}\n" if label is None else f"{text_of(label)}\n{told}"


def _captioned(split: Split, rows: list[tuple[int, str]], task: Task | None) -> list[Picture | Passage]:
    if not rows:
        return []
    if task is not None:
        texts = _texts(split, task, [number for number, _ in rows])
        return [passage(caption, text) for (_, caption), text in zip(rows, texts, strict=False)]
    x, _ = split.batch([number for number, _ in rows])
    if not isinstance(x, Tensor):
        return []
    images = x[:, None] if x.dim() == 3 else x
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not all(4 <= side <= 1024 for side in images.shape[2:]):
        return []
    return [picture(caption, image) for (_, caption), image in zip(rows, images, strict=True)]


def _texts(split: Split, task: Task, numbers: Sequence[int]) -> list[list[str]]:
    """The tokens' texts of some samples; none where they hold no text."""
    x, y = split.batch(numbers)
    found = [reading(task, x, y, k) for k in range(size(x))]
    decode: Decode | None = split.decode
    return [texts_of(one, decode) for one in found if one is not None]


def _add(split: Split, task: Task, rows: Sequence[dict[str, Any]]) -> None:
    for row, text in zip(rows, _texts(split, task, [r["index"] for r in rows]) if rows else [], strict=False):
        row["text"] = "".join(text)
