"""export.json: what lies in an exported folder, what it was made from, and how it was checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from prunekit.artifact import SOMETIMES, Artifact, Cost, conform
from prunekit.checkpoint import file_checksum
from prunekit.errors import ArtifactError
from prunekit.exporting.placing import files_in
from prunekit.measure import Speed
from prunekit.reusing import reusable

EXPORT = "export.json"


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Artifact):
    """An export.

    Attributes:
        to: the format.
        made_from: digests of the model, its plan and its figures, and the format.
        loads_with: what reads the folder, in words.
        files: every other file of the folder -> the checksum of its bytes.
        tolerance: what answers may differ by from the pruned model's, as a share of their size; None where none were compared.
        difference: what they differed by.
        samples: sizes of the batches that were compared.
        notes: what the user should know.
        axes: of a program, input -> its axes' sizes, or what they are free in.
        speed: of a program, batch size -> milliseconds of it (``pruned_ms``) beside torch's (``dense_ms``).
        pruning: of a model that was pruned from files to files: method, samples, what went and what it came to.
    """

    KIND: ClassVar[str] = "export"
    CALLED: ClassVar[str] = "export record"

    to: str
    made_from: dict[str, Any]
    loads_with: str
    files: dict[str, str]
    tolerance: float | None
    difference: float | None
    samples: list[int]
    notes: list[str]
    axes: dict[str, list[Any]] | None = field(default=None, metadata=SOMETIMES)
    speed: dict[str, Speed] | None = field(default=None, metadata=SOMETIMES)
    pruning: dict[str, Any] | None = field(default=None, metadata=SOMETIMES)
    cost: Cost

    def check(self) -> None:
        """Files are those of the folder itself."""
        for name in self.files:
            if not name or name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"files.{name} is no file of the folder")
        conform(self.made_from.get("weights"), str, "made_from.weights")


def standing(folder: Path, made_from: Mapping[str, Any], overwrite: bool) -> ExportRecord | None:
    """The same export, where it stands in ``folder`` already; None where one may be written there.

    Raises:
        ArtifactError: something else is there, or an export of other inputs that may not be overwritten.
    """
    if (found := export_in(folder)) is None:
        return None
    if not reusable(folder, found.made_from, made_from, overwrite):
        return None
    for name, proof in found.files.items():
        if not (folder / name).is_file() or file_checksum(folder / name) != proof:
            raise ArtifactError(f"{folder / name}: is not what the export wrote; --overwrite makes it again")
    return found


def export_in(folder: Path) -> ExportRecord | None:
    """The export that stands in ``folder``, beside a run of ``compress`` or alone; None where nothing does.

    Raises:
        ArtifactError: something else is there.
    """
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder}: is no folder; choose another name")
    names = files_in(folder)
    if not names:
        return None
    if EXPORT not in names:
        raise ArtifactError(f"{folder}: holds {min(names)} and no {EXPORT}, so no export wrote it; choose another folder")
    found = ExportRecord.load(folder / EXPORT)
    if foreign := sorted(names - {*found.files, EXPORT}):
        raise ArtifactError(f"{folder}: holds {foreign[0]}, which the export in it did not write; choose another folder")
    return found
