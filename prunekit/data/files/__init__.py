"""Data in files: rows of text, pictures or recordings become batches for a model, in four splits.

``datasets`` and ``transformers`` are imported by the functions that need them; a plain install has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.data.files.options import Options, every_placed, names_files, placed
from prunekit.errors import UsageError, nearest

if TYPE_CHECKING:
    from prunekit.data.splits import Split

__all__ = ["Options", "every_placed", "names_files", "placed", "read"]


def read(
    files: str | Path | Mapping[str, str], *, model: str | Path | None = None, task: str | None = None, **options: Any
) -> dict[str, Split]:
    """The four splits of data in files, as ``score`` and ``compress`` take them: train, validation, test, scoring.

    Args:
        files: a file, a folder, the name of a data set on the Hugging Face hub, or a mapping of splits to these.
        model: the model's folder, whose tokenizer or processor makes the batches; else ``tokenizer`` names its folder.
        task: what the model is for; by default what the folder's config says.
        options: see ``Options``; a column may be given as text.

    Raises:
        ArtifactError: a file is missing or broken, or a row is; names the line.
        UsageError: columns or labels do not fit, there are too few rows, or something is not installed.

    Example:
        >>> from prunekit.data.files import read
        >>> read("/no/such-file.csv", tokenizer="/no/such-folder", task="classification")
        Traceback (most recent call last):
        prunekit.errors.ArtifactError: /no/such-file.csv: no such file
    """
    from prunekit.data.files.reading import read_files
    from prunekit.data.splits import as_splits
    from prunekit.huggingface import task_of
    from prunekit.task import get_task

    known = list(Options.__dataclass_fields__)
    if strange := next((name for name in options if name not in known), None):
        raise UsageError(f"read has no option {strange!r}; {nearest(strange, known)}")
    for name in ("text", "label", "classes"):
        if isinstance(options.get(name), str):
            options[name] = (options[name],)
        elif options.get(name) is not None:
            options[name] = tuple(options[name])
    place = every_placed(str(files) if isinstance(files, Path) else files, Path())
    if task is None and model is not None:
        task = task_of(Path(model))
    found = read_files(place, Options(**options), task=task, model=None if model is None else str(model))
    return as_splits(found, str(files), get_task(task).batch)
