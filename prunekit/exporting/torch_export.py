"""torch-export: the pruned model as a program that torch alone loads and runs, without the model's code."""

from __future__ import annotations

from pathlib import Path

import torch

from prunekit import batch
from prunekit.errors import ArtifactError, quoted
from prunekit.exporting.program import checked_sizes, exported, names, others, several, without_cache
from prunekit.exporting.same import answered, compare, rounding
from prunekit.exporting.subject import Format, Subject, Written
from prunekit.measure.undisturbed import placed

FILE = "model.pt2"


def write(subject: Subject, folder: Path) -> Written:
    """Writes ``model.pt2``, reads it back and compares its answers on other samples."""
    inputs = placed(subject.model, several(subject.given_inputs("torch-export")))
    program, axes = exported(subject.model, inputs)
    path = folder / FILE
    try:
        torch.export.save(program, path)
        back = torch.export.load(path).module()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ArtifactError(f"{FILE}: torch could not save and load this program ({quoted(error)})") from error
    tolerance, worst, sizes = rounding(subject.model, 1e-5), 0.0, checked_sizes(inputs)
    with without_cache(subject.model), torch.no_grad():
        for size in sizes:
            other = others(inputs, axes, size)
            found = back(*batch.leaves(other))
            worst = max(worst, compare(found, answered(subject.model, other), tolerance, f"{FILE}, with {size} samples"))
    return Written(
        f"torch.export.load({FILE!r}).module()", tolerance, worst, sizes, axes=dict(zip(names(inputs), axes, strict=True))
    )


FORMAT = Format(write, FILE)
