"""What proves that a recording is as it was when it ended: a checksum of every file, and of every row of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit import bounded, checkpoint
from prunekit.errors import ArtifactError
from prunekit.remote import Place
from prunekit.trajectory.store import SUMS, Finished

LOG = "steps.jsonl"
FIXED, START, ENDED = "fixed.safetensors", "start.safetensors", "ended.safetensors"


def seal(folder: Path, finished: Finished) -> dict[str, str]:
    """Writes the rows' checksums of a recording that has ended; returns the files' own, for trajectory.json."""
    checkpoint.write_tensors(folder / SUMS, finished.sums, {"kind": "rows"})
    found = {LOG: checkpoint.file_checksum(folder / LOG)} if (folder / LOG).exists() else {}
    for name in (FIXED, START, ENDED, SUMS):
        if (folder / name).exists() and (proof := checkpoint.read_checksum(folder / name)) is not None:
            found[name] = proof
    return found


def going_on(folder: Path, *, complete: bool = False) -> dict[str, Any]:
    """trajectory.json of a recording that goes on: without what says how it ended; ``complete``: also of one that was.

    Raises:
        ArtifactError: there is none, or it was complete.
    """
    header = checkpoint.read_json(folder / "trajectory.json", "trajectory")
    if header["complete"] and not complete:
        raise ArtifactError(f"{folder}: recording was complete after {header['steps']} steps; nothing to resume")
    ended = ("steps", "last_state", "hash", "files", "cost")
    return {**{key: value for key, value in header.items() if key not in ended}, "complete": False}


class Proof:
    """Reads a recording's files, each compared with what ``seal`` returned.

    Args:
        files: that; None where recording was cut off, or is older than checksums, and nothing is compared.
    """

    def __init__(self, folder: Place, files: Mapping[str, str] | None) -> None:
        self.folder, self.files = folder, files

    @cached_property
    def sums(self) -> dict[str, Tensor] | None:
        """By stream, its rows' checksums."""
        return None if self.files is None else self.tensors(SUMS)

    def has(self, name: str) -> bool:
        """Whether a file belongs to the recording."""
        return (self.folder / name).exists() if self.files is None else name in self.files

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a safetensors file of the recording holds.

        Raises:
            ArtifactError: it is missing, damaged, or not the one that was recorded.
        """
        path = self.folder / name
        if self.files is not None:
            self._agree(path, checkpoint.read_checksum(path))
        return checkpoint.read_tensors(path)

    def log(self) -> Iterator[str]:
        """The step log's whole lines.

        Raises:
            ArtifactError: it cannot be read, or was changed after it was recorded.
        """
        path = self.folder / LOG
        if self.files is not None:
            self._agree(path, checkpoint.file_checksum(path))
        return bounded.lines(path)

    def _agree(self, path: Place, found: str | None) -> None:
        assert self.files is not None
        checkpoint.agree(path, found, self.files.get(path.name), "is not the file that was recorded")
