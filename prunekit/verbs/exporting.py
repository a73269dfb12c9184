"""export: a run's pruned model in a form that others load."""

from __future__ import annotations

import warnings
from itertools import chain
from pathlib import Path
from typing import Any

from prunekit.errors import ArtifactError, Note, UsageError
from prunekit.explain import EvaluationRecord
from prunekit.exporting import Subject, check_tokens_can_go, format_of, written
from prunekit.exporting.vocabulary import Vocabulary, vocabulary_of
from prunekit.verbs.pruned_folder import open_pruned
from prunekit.verbs.run_folder import Run

SAMPLES = 4
"""Validation samples that a program is made with, and that answers are compared on."""


def export_pruned(
    run: Run, pruned: Path, to: str, folder: Path, overwrite: bool = False, used_tokens: bool = False
) -> dict[str, Any]:
    """Exports a pruned model of the run.

    Args:
        used_tokens: tokens that no split of the run's data uses leave the model and its tokenizer.

    Returns:
        what export.json in ``folder`` holds, and ``reused``.

    Raises:
        UsageError: the format does not take this model, or a package is not installed.
        ArtifactError: the pruned model is damaged, or ``folder`` holds something else.
    """
    format_of(to)
    check_tokens_can_go(to, used_tokens)
    manifest, _, model = open_pruned(run, pruned)
    evaluation = _evaluation(pruned / "eval.json", manifest.plan)
    inputs = None
    if run.recipe.data is not None:
        validation = run.splits["validation"]
        inputs = validation.batch(range(min(SAMPLES, len(validation))))[0]
    batches = tuple(run.recipe.eval.latency_batches)
    vocabulary = _vocabulary(run, model) if used_tokens else None
    record, reused = written(Subject(model, inputs, manifest, evaluation, batches, vocabulary), to, folder, overwrite)
    return {**record.content(), "folder": str(folder), "reused": reused}


def _vocabulary(run: Run, model: Any) -> Vocabulary:
    if run.recipe.data is None:
        raise UsageError("used_tokens (--used-tokens): the run has no data that would use tokens; import … --data gives it some")
    splits = run.splits.values()
    known = [getattr(split.source, "texts", None) for split in splits]
    texts = None if None in known else [text for each in known if each is not None for text in each()]
    return vocabulary_of(model, chain.from_iterable(split.samples() for split in splits), texts)


def _evaluation(path: Path, plan: str) -> EvaluationRecord | None:
    """The figures, where the model was measured as it is."""
    if not path.exists():
        text = f"{path}: not there, so what was lost is not on the card; prunekit eval {path.parent} measures it"
        warnings.warn(text, Note, stacklevel=3)
        return None
    found = EvaluationRecord.load(path)
    if found.made_from["plan"] != plan:
        raise ArtifactError(
            f"{path}: measured a model of another plan; prunekit eval {path.parent} --overwrite measures this one"
        )
    return found
