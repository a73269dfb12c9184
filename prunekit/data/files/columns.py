"""Which columns of a table hold a sample's text, picture or recording, and its label: named by the user, or clear from names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.data.files.options import Options
from prunekit.errors import UsageError

TEXTS = ("text", "sentence", "content", "review", "document", "body", "code", "raw_content")
WORDS = ("tokens", "words")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
LABELS = ("label", "labels", "target", "class", "category")
TAGS = ("ner_tags", "tags", "pos_tags", *LABELS)
SOURCES = ("source", "input", "article", "document", "text", "question")
ANSWERS = ("target", "output", "summary", "highlights", "answer", "label")
IMAGES, AUDIO = ("image", "img", "picture"), ("audio", "speech")
LANGUAGE = ("causal_lm", "masked_lm")
"""Tasks whose text is its own label."""


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns: those that a sample's input is made of, and its labels'.

    Attributes:
        kind: of the input: ``text``, ``words``, ``image`` or ``audio``.
    """

    kind: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]


def chosen(names: Sequence[str], options: Options, task: str | None, where: str) -> Columns:
    """The columns that count.

    Args:
        names: of the table's columns.
        task: what the model is for; None where labels will show it.
        where: the table, for messages.

    Raises:
        UsageError: a column is missing, or it is not clear which is meant; lists them and says the option.
    """
    for key, given in (
        ("text", options.text),
        ("label", options.label),
        ("image", _one(options.image)),
        ("audio", _one(options.audio)),
    ):
        if missing := [one for one in given if one not in names]:
            raise UsageError(f"{where}: has no column {missing[0]!r} ({key}); it has {', '.join(names)}")
    if len(options.text) > 2:
        raise UsageError(f"{where}: text names {len(options.text)} columns; a sample has one text, or a pair of them")
    kind, inputs = _inputs(names, options, task, where)
    if task in (*LANGUAGE, "unlabelled"):
        return Columns(kind, inputs, ())
    rest = [name for name in names if name not in inputs]
    wanted = TAGS if task == "token_classification" else ANSWERS if task == "seq2seq" else LABELS
    labels = options.label or _guess(rest, wanted, "label", where, rest if len(rest) == 1 else [])
    if task in ("classification", "token_classification", "seq2seq", "binary") and len(labels) > 1:
        raise UsageError(f"{where}: label names {len(labels)} columns; the task {task} has one")
    return Columns(kind, inputs, labels)


def _inputs(names: Sequence[str], options: Options, task: str | None, where: str) -> tuple[str, tuple[str, ...]]:
    if options.text:
        return ("words" if task == "token_classification" else "text"), options.text
    for kind, given, known in (("image", options.image, IMAGES), ("audio", options.audio, AUDIO)):
        if found := _one(given) or tuple(name for name in known if name in names)[:1]:
            return kind, found
    if task == "token_classification":
        return "words", _guess(names, WORDS, "text", where)
    if task == "seq2seq":
        return "text", _guess(names, SOURCES, "text", where)
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    if pair is not None and task not in LANGUAGE:
        return "text", pair
    others = [name for name in names if name not in (*options.label, *LABELS)]
    return "text", _guess(names, TEXTS, "text", where, others if len(others) == 1 else [])


def _guess(names: Sequence[str], known: Sequence[str], key: str, where: str, only: Sequence[str] = ()) -> tuple[str, ...]:
    """The one column of a known name, or the only one that can be meant."""
    found = [name for name in known if name in names] or list(only)
    if len(found) == 1 or (found and key == "label" and found[0] in ("label", "labels", "ner_tags")):
        return (found[0],)
    which = f"{' and '.join(found)} could each be" if found else "no column's name says that it is"
    listed = f"there are {', '.join(names)}" if names else "there is no column beside the text"
    raise UsageError(f"{where}: {which} the {key}; {listed}; say which by {key} (--{key} COLUMN)")


def _one(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)
