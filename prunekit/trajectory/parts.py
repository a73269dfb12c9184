"""A recording that several processes wrote, read as one: every part of it has files of each process that held coordinates then.

``part-K/rank-R/`` holds what process R wrote of the coordinates that were its own, from where a recording began, or went on with
other processes. What one process writes alone from the beginning lies in the trajectory's folder itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prunekit import bounded, checkpoint
from prunekit.errors import ArtifactError
from prunekit.remote import Place
from prunekit.trajectory.layout import Layout
from prunekit.trajectory.proof import LOG, Proof
from prunekit.trajectory.shards import Span
from prunekit.trajectory.states import READERS, WRITERS
from prunekit.trajectory.store import NAMES, Finished, RowReader, RowWriter, Where, joined

STREAMS = ("states", "second_moments", "random")


@dataclass(frozen=True)
class Part:
    """From where a recording began or went on, to where it ended or went on with other processes.

    Attributes:
        folders: of the processes, in their order.
        spans: of each process, where its coordinates lie in the whole state ``(P,)``.
        rows: by stream, how many rows lie in earlier parts; ``lines``: of the step log.
        proofs: of the files in each folder.
    """

    folders: tuple[Place, ...]
    spans: tuple[tuple[Span, ...], ...]
    rows: Mapping[str, int]
    lines: int
    proofs: tuple[Proof, ...]

    @property
    def local(self) -> list[Path]:
        """The folders, for whoever writes into them: none is behind fsspec, where recordings are only read."""
        return [folder for folder in self.folders if isinstance(folder, Path)]

    @property
    def several(self) -> bool:
        """Whether each process wrote coordinates of its own."""
        return len(self.folders) > 1

    def width(self, rank: int) -> int:
        return sum(end - begin for begin, end in self.spans[rank])

    def lines_written(self) -> int | None:
        """Steps that every process has written whole, those in earlier parts included; None where the step log alone says so."""
        others = [folder / LOG for rank, folder in enumerate(self.folders) if rank]
        if not others:
            return None
        return self.lines + min(sum(1 for _ in bounded.lines(path)) if path.exists() else 0 for path in others)


def part_json(spans: Sequence[Sequence[Sequence[int]]] | None, rows: Mapping[str, int], lines: int) -> dict[str, Any]:
    """A part as trajectory.json has it; ``spans``: None for what lies in the trajectory's folder itself."""
    every = None if spans is None else [[list(span) for span in one] for one in spans]
    return {"spans": every, "rows": {name: rows.get(name, 0) for name in STREAMS}, "lines": lines}


def parts_of(folder: Place, header: Mapping[str, Any], layout: Layout) -> list[Part]:
    """The parts of a recording, oldest first; mostly one.

    Raises:
        ArtifactError: what trajectory.json says of them does not cover the state.
    """
    if "parts" not in header:
        proof = Proof(folder, header.get("files"))
        return [Part((folder,), (((0, layout.total),),), dict.fromkeys(STREAMS, 0), 0, (proof,))]
    found = []
    for number, one in enumerate(header["parts"]):
        folders: tuple[Place, ...] = (folder,)
        spans: tuple[tuple[Span, ...], ...] = (((0, layout.total),),)
        if one["spans"] is not None:
            spans = tuple(tuple((int(b), int(e)) for b, e in mine) for mine in one["spans"])
            folders = tuple(rank_folder(folder, number, rank) for rank in range(len(spans)))
        place = 0
        for begin, end in sorted(span for mine in spans for span in mine):
            if begin != place or end < begin:
                break
            place = end
        if place != layout.total:
            raise ArtifactError(f"{folder}: what its processes wrote does not add up to whole states (part {number})")
        files = one.get("files") or [None] * len(folders)
        proofs = tuple(Proof(place, mine) for place, mine in zip(folders, files, strict=True))
        found.append(Part(folders, spans, {name: int(one["rows"][name]) for name in STREAMS}, int(one["lines"]), proofs))
    return found


def rank_folder(folder: Where, part: int, rank: int) -> Where:
    return folder / f"part-{part}" / f"rank-{rank}"


class _Rows(Protocol):
    def read(self) -> None: ...
    def digest(self) -> str: ...


class JoinedRows:
    """Rows over all parts, each put together from what the processes wrote; a single part of one process gives its own rows.

    Args:
        open_one: ``(folder, width, rows, proof)`` -> a reader and its function from a row's number to the row.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        stream: str,
        rows: int,
        width: int,
        dtype: np.dtype[Any],
        open_one: Callable[[Place, int, int, Proof], tuple[_Rows, Callable[[int], Tensor]]],
    ) -> None:
        self._width, self._dtype = width, torch.from_numpy(np.empty(0, dtype)).dtype
        self._parts: list[tuple[int, int, list[tuple[tuple[Span, ...], _Rows, Callable[[int], Tensor]]]]] = []
        self.rows = rows
        for number, part in enumerate(parts):
            first = part.rows[stream]
            end = min(parts[number + 1].rows[stream], rows) if number + 1 < len(parts) else rows
            if end <= first:
                continue
            pieces = []
            for rank, folder in enumerate(part.folders):
                if part.width(rank):
                    pieces.append((part.spans[rank], *open_one(folder, part.width(rank), end - first, part.proofs[rank])))
            self._parts.append((first, end, pieces))

    def row(self, index: int) -> Tensor:
        """Row ``index``, ``(P,)``."""
        first, _, pieces = next(one for one in reversed(self._parts) if one[0] <= index)
        if len(pieces) == 1 and pieces[0][0] == ((0, self._width),):
            return pieces[0][2](index - first)
        found = torch.empty(self._width, dtype=self._dtype)
        for spans, _, row in pieces:
            own, at = row(index - first), 0
            for begin, end in spans:
                found[begin:end] = own[at : at + end - begin]
                at += end - begin
        return found

    state = row

    def read(self) -> None:
        """Reads every row, and so proves it."""
        for _, _, pieces in self._parts:
            for _, reader, _ in pieces:
                reader.read()

    def digest(self) -> str:
        """A hash of all rows; reads every byte."""
        every = [reader for _, _, pieces in self._parts for _, reader, _ in pieces]
        found = [Finished(reader.digest(), {}) for reader in every]
        return joined(found).hash


def open_states(parts: Sequence[Part], kind: str, rows: int, width: int, dtype: np.dtype[Any]) -> JoinedRows:
    """The states of a recording."""

    def one(folder: Place, own: int, count: int, proof: Proof) -> tuple[_Rows, Callable[[int], Tensor]]:
        reader = READERS[kind](folder, own, dtype, count, proof.sums)
        return reader, reader.state

    return JoinedRows(parts, "states", rows, width, dtype, one)


def open_rows(parts: Sequence[Part], stream: str, rows: int, width: int, dtype: np.dtype[Any]) -> JoinedRows:
    """Another stream of a recording."""

    def one(folder: Place, own: int, count: int, proof: Proof) -> tuple[_Rows, Callable[[int], Tensor]]:
        reader = RowReader(folder, stream, own, NAMES[dtype], count, proof.sums)
        return reader, reader.row

    return JoinedRows(parts, stream, rows, width, dtype, one)


def random_parts(parts: Sequence[Part], width: int) -> list[Part]:
    """The parts as the stream of random states has them: the first process writes it, as it is."""
    return [Part(p.folders[:1], (((0, width),),), p.rows, p.lines, p.proofs[:1]) for p in parts]


def joined_tensors(part: Part, name: str, *, optional: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that each process wrote its own rows of; ``optional``: it may not be there.

    Raises:
        ArtifactError: a file is missing or damaged, or rows are.
    """
    found: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    for folder, proof in zip(part.folders, part.proofs, strict=True):
        if optional and not proof.has(name):
            continue
        places = checkpoint.read_header(folder / name).get("rows", {})
        for key, tensor in proof.tensors(name).items():
            if key in places:
                pieces.setdefault(key, []).append((*places[key], tensor))
            else:
                found.setdefault(key, tensor)
    for key, several in pieces.items():
        several.sort(key=lambda piece: piece[0])
        whole = torch.cat([tensor.reshape(-1, *tensor.shape[1:]) for _, _, tensor in several])
        if len(whole) != several[0][1]:
            raise ArtifactError(f"{part.folders[0] / name}: {key} has {len(whole)} of {several[0][1]} rows over all processes")
        found[key] = whole
    return found


def trimmed(folder: Path, kind: str, width: int, dtype: np.dtype[Any], counts: Mapping[str, int]) -> Finished:
    """Ends what a process wrote of a part after ``counts`` rows of its streams, since the recording went on elsewhere."""
    random = torch.get_rng_state().numel()
    ended = [WRITERS[kind](folder, width, dtype, rows=counts["states"]).finish()] if counts["states"] and width else []
    for stream, own, type_ in (("second_moments", width, dtype), ("random", random, np.dtype(np.uint8))):
        if counts[stream] and own:
            ended.append(RowWriter(folder, stream, own, type_, rows=counts[stream]).finish())
    return joined(ended) if ended else Finished("", {})
