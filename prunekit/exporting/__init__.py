"""A pruned model in the forms that others load: folders of transformers, ONNX, torch programs, plain tensors.

A format is a file here that offers a ``FORMAT``, and a line in ``FORMATS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.apply.manifest import manifest_of
from prunekit.batch import Batch, Inputs
from prunekit.checkpoint import checksum, file_checksum
from prunekit.criteria import model_digest
from prunekit.errors import UsageError
from prunekit.explain import EvaluationRecord
from prunekit.exporting import hf, onnx, state_dict, torch_export
from prunekit.exporting.placing import recover, taking_place
from prunekit.exporting.pretrained import load_hf
from prunekit.exporting.record import EXPORT, ExportRecord, export_in, standing
from prunekit.exporting.subject import Format, Subject, Written
from prunekit.exporting.vocabulary import vocabulary_of
from prunekit.plan import Plan
from prunekit.registry import Registry
from prunekit.trajectory.bare import bare

__all__ = ["FORMATS", "ExportRecord", "Format", "Subject", "Written", "export", "load_hf", "placed", "written"]


def _accept(found: Any, name: str) -> Format:
    if not isinstance(found, Format):
        raise UsageError(f"format {name!r} is a {type(found).__name__}; it must be a prunekit.exporting.Format")
    return found


FORMATS: Registry[Format] = Registry(
    "format",
    "prunekit.formats",
    _accept,
    {"hf": hf.FORMAT, "onnx": onnx.FORMAT, "torch-export": torch_export.FORMAT, "state-dict": state_dict.FORMAT},
)
"""Every format by its name."""


def export(
    model: nn.Module,
    to: str,
    folder: str | Path,
    inputs: Inputs | None = None,
    *,
    plan: Plan | None = None,
    used_tokens: Iterable[Batch] | None = None,
    overwrite: bool = False,
) -> ExportRecord:
    """Writes a pruned model in a form that others load, reads it back and compares what it computes.

    The folder takes its place whole, after the comparison; where anything fails, nothing is written.

    Args:
        model: what ``prune`` returned, fine-tuned or not, in wrappers or without; left as it is.
        to: ``hf`` (a model of transformers), ``onnx``, ``torch-export``, ``state-dict``, or ``module:format``.
        folder: new, empty, or an earlier export.
        inputs: some samples, as the model is called: programs are made with them, and answers are compared on them.
        plan: the plan that the model was pruned by, for ``state-dict`` and for shapes that no config of transformers says.
        used_tokens: all batches ``(inputs, labels)`` of the data: for ``hf``, tokens that none of them uses leave the
            embedding, the output layer and the tokenizer; see docs/export.md.
        overwrite: replace an earlier export that was made from other inputs.

    Returns:
        what ``export.json`` in the folder holds: how it loads, what was compared, what differed.

    Raises:
        UsageError: the format does not take this model, or a package is not installed; says which.
        ArtifactError: the folder holds something else, what was written computes something else, or the disk is full.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, export, make_plan, prune, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(8, 4)
        >>> scores = score(Trajectory.of(model), model, criterion="magnitude")
        >>> plan = make_plan(scores, model, x, sparsity=0.5, structure="channels")
        >>> done = export(prune(model, plan, x), "state-dict", getfixture("tmp_path") / "out", x, plan=plan)
        >>> sorted(done.files), done.difference
        (['model.safetensors', 'prunekit.json'], 0.0)
    """
    format_of(to)
    small = bare(model)
    manifest = None if plan is None else manifest_of(small, plan)
    check_tokens_can_go(to, used_tokens is not None)
    vocabulary = None if used_tokens is None else vocabulary_of(small, used_tokens)
    return written(Subject(small, inputs, manifest, vocabulary=vocabulary), to, Path(folder), overwrite)[0]


def check_tokens_can_go(to: str, asked: bool) -> None:
    """Raises UsageError where tokens are to go in a format that writes no tokenizer."""
    if asked and to != "hf":
        raise UsageError(f"used_tokens (--used-tokens) goes with hf, which writes the tokenizer along; the format is {to}")


def _figures(evaluation: EvaluationRecord) -> dict[str, Any]:
    """What an export may tell of an evaluation: what is measured of exports themselves, or added later, is not part of them."""
    return replace(evaluation, lm_eval=None, onnx=None).content()


def format_of(to: str) -> Format:
    """The format of a name.

    Raises:
        UsageError: there is none; near names are offered.
    """
    return FORMATS[to]


def written(subject: Subject, to: str, folder: Path, overwrite: bool = False) -> tuple[ExportRecord, bool]:
    """Writes ``folder`` whole, or nothing; a run of ``compress`` in it stays.

    Returns:
        what its export.json holds, and whether the same export stood there already.

    Raises:
        UsageError, ArtifactError: as ``export``.
    """
    form = format_of(to)
    made_from = {
        "to": to,
        "weights": model_digest(subject.model),
        "plan": None if subject.manifest is None else subject.manifest.plan,
        "evaluation": None if subject.evaluation is None else checksum(_figures(subject.evaluation)),
    }
    if subject.vocabulary is not None:
        made_from["used_tokens"] = checksum({"stays": subject.vocabulary.stays.tolist()})
    return placed(to, made_from, Path(folder), overwrite, lambda temporary: form.write(subject, temporary))


def placed(
    to: str, made_from: dict[str, Any], folder: Path, overwrite: bool, write: Callable[[Path], Written]
) -> tuple[ExportRecord, bool]:
    """Has ``write`` fill an empty folder, which takes its place whole, with its record, unless the same export stands there.

    Returns, raises: as ``written``.
    """
    recover(folder)
    if (stands := standing(folder, made_from, overwrite)) is not None:
        return stands, True
    started = time.perf_counter()
    before = export_in(folder)
    with taking_place(folder, list(before.files) if before is not None else []) as temporary:
        found = write(temporary)
        record = ExportRecord(
            to=to,
            made_from=made_from,
            loads_with=found.loads_with,
            files={
                str(path.relative_to(temporary)): file_checksum(path) for path in sorted(temporary.rglob("*")) if path.is_file()
            },
            tolerance=found.tolerance,
            difference=found.difference,
            samples=found.samples,
            notes=found.notes,
            axes=None if found.axes is None else dict(found.axes),
            speed=None if found.speed is None else dict(found.speed),
            pruning=None if found.pruning is None else dict(found.pruning),
            cost={"seconds": 0.0},
        )
        record = replace(record, cost={"seconds": round(time.perf_counter() - started, 3)})
        record.save(temporary / EXPORT)
    return ExportRecord.load(folder / EXPORT), False
