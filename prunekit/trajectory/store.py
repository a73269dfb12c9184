"""Where rows of numbers lie: blocks in safetensors files that are valid while they are still being filled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from prunekit import bounded, durable
from prunekit.checkpoint import agree
from prunekit.errors import ArtifactError
from prunekit.remote import Place, Remote

SUMS = "rows.safetensors"
HEADER_BYTES = 256  # length field + JSON padded with spaces, which the format allows; the rows begin aligned
BLOCK_BYTES = 256 * 2**20
NAMES: dict[np.dtype[Any], str] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.float16): "F16",
    np.dtype(np.uint8): "U8",
}
DTYPES: dict[str, np.dtype[Any]] = {name: dtype for dtype, name in NAMES.items()}


def block_rows(row_bytes: int) -> int:
    """How many rows a block holds: 1 to 1,024, about 256 MiB."""
    return max(1, min(1024, BLOCK_BYTES // max(row_bytes, 1)))


Where = TypeVar("Where", Path, Remote, Place)


def block_path(folder: Where, stream: str, block: int) -> Where:
    return folder / f"{stream}-{block:05d}.safetensors"


def _header(stream: str, rows: int, width: int, dtype: np.dtype[Any]) -> bytes:
    facts = {"dtype": NAMES[dtype], "shape": [rows, width], "data_offsets": [0, rows * width * dtype.itemsize]}
    text = json.dumps({stream: facts}).encode()
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)


class Finished(NamedTuple):
    """What a stream came to: the SHA-256 (32 hex digits) of all rows, and by stream the XXH3 (64 bits) of each, ``(rows,)``."""

    hash: str
    sums: dict[str, Tensor]


class RowWriter:
    """Appends rows of ``width`` numbers to a named stream.

    Each block file is laid out in full (sparsely) before its first row, so that a process killed at any moment leaves
    safetensors files that open; how many rows count is the step log's to say. ``finish`` trims the last block.

    Args:
        rows: rows that are there already and stay (a recording that goes on); later ones are dropped.
    """

    def __init__(self, folder: Path, stream: str, width: int, dtype: np.dtype[Any], rows: int = 0) -> None:
        self.folder, self.stream, self.width, self.dtype = folder, stream, width, np.dtype(dtype)
        self.row_bytes = width * self.dtype.itemsize
        several = rows and block_path(folder, stream, 1).exists()  # a single block may have been trimmed
        self.rows_per_block = _rows_in_first(folder, stream) if several else block_rows(self.row_bytes)
        self.rows = rows
        self._file: int | None = None
        if rows % self.rows_per_block:
            self._open(rows // self.rows_per_block, fresh=False)

    def append(self, row: np.ndarray[Any, Any]) -> None:
        """Writes one row.

        Raises:
            OSError: the disk is full; rows written before stay readable.
        """
        block, within = divmod(self.rows, self.rows_per_block)
        if within == 0:
            self._open(block, fresh=True)
        assert self._file is not None
        data = np.ascontiguousarray(row, dtype=self.dtype).data.cast("B") if self.width else memoryview(b"")
        _write_all(self._file, data, HEADER_BYTES + within * self.row_bytes, self._path)
        self.rows += 1

    def _open(self, block: int, fresh: bool) -> None:
        self._close()
        self._path = block_path(self.folder, self.stream, block)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o666)
        _write_all(self._file, _header(self.stream, self.rows_per_block, self.width, self.dtype), 0, self._path)
        os.ftruncate(self._file, HEADER_BYTES + self.rows_per_block * self.row_bytes)

    def finish(self) -> Finished:
        """Trims the last block to its rows.

        They are hashed here and not as they come: hashing takes longer than writing, and would slow training down.
        """
        if self._file is not None and self.rows:
            rows = (self.rows - 1) % self.rows_per_block + 1
            os.ftruncate(self._file, HEADER_BYTES + rows * self.row_bytes)
            _write_all(self._file, _header(self.stream, rows, self.width, self.dtype), 0, self._path)
            os.fsync(self._file)
        self._close()
        hashed, sums = hashlib.sha256(), np.empty(self.rows, np.uint64)
        reader = RowReader(self.folder, self.stream, self.width, NAMES[self.dtype], self.rows)
        for index in range(self.rows):
            data = reader.row(index).numpy().data
            hashed.update(data)
            sums[index] = xxhash.xxh3_64_intdigest(data)
        return Finished(hashed.hexdigest()[:32], {self.stream: torch.from_numpy(sums.view(np.int64))})

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class RowReader:
    """Rows by memory map, where reading one touches only its own pages; behind fsspec by ranges of bytes.

    Args:
        sums: what the rows were when recording ended, ``Finished.sums``; None where it was cut off, or is older than they.

    Raises:
        ArtifactError: a block is missing or shorter than its rows, or ``sums`` are of another number of rows; names the file.
    """

    def __init__(
        self, folder: Place, stream: str, width: int, dtype: str, rows: int, sums: Mapping[str, Tensor] | None = None
    ) -> None:
        self.folder, self.stream, self.width, self.dtype = folder, stream, width, DTYPES[dtype]
        self.rows = rows
        self._sums = None if sums is None else sums.get(stream)
        if sums is not None and (self._sums is None or self._sums.shape != (rows,)):
            raise ArtifactError(f"{folder / SUMS}: is not of the {rows} rows of {stream}")
        self._proved = [False] * rows
        self.rows_per_block = max(1, _rows_in_first(folder, stream)) if rows else 1
        self._blocks: dict[int, np.ndarray[Any, Any] | _Ranges] = {}
        for block in range(-(-rows // self.rows_per_block)):
            path = block_path(folder, stream, block)
            if not path.exists():
                raise ArtifactError(f"{path}: no such file, though the trajectory has {rows} rows of {stream}")
            expected, found = HEADER_BYTES + self._rows_in(block) * width * self.dtype.itemsize, bounded.size(path)
            if found < expected:
                raise ArtifactError(f"{path}: truncated ({found} bytes, {expected} expected)")

    def _rows_in(self, block: int) -> int:
        return min(self.rows_per_block, self.rows - block * self.rows_per_block)

    def row(self, index: int) -> Tensor:
        """Row ``index``, ``(width,)``, backed by the file; writing to it does not change the file.

        Raises:
            ArtifactError: the file was cut short, or the row was changed, since recording ended.
        """
        block, within = divmod(index, self.rows_per_block)
        if block not in self._blocks:
            self._blocks.clear()  # one open block at a time: long trajectories have more blocks than file handles
            self._blocks[block] = self._opened(block)
        row = self._blocks[block][within]
        if self._sums is not None and not self._proved[index]:
            found, written = xxhash.xxh3_64_hexdigest(row.data), f"{int(self._sums[index]) % 2**64:016x}"
            path = block_path(self.folder, self.stream, block)
            agree(path, found, written, f"row {within} was changed after it was recorded")
            self._proved[index] = True
        return torch.from_numpy(row)

    def _opened(self, block: int) -> np.ndarray[Any, Any] | _Ranges:
        path, shape = block_path(self.folder, self.stream, block), (self._rows_in(block), self.width)
        with bounded.opened(path) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if (found := bounded.size(path)) < start + shape[0] * shape[1] * self.dtype.itemsize:
            raise ArtifactError(f"{path}: truncated or rewritten ({found} bytes)")
        if isinstance(path, Remote):
            return _Ranges(path, start, self.width, self.dtype)
        return np.memmap(path, self.dtype, mode="c", offset=start, shape=shape)

    def read(self) -> None:
        """Reads every row, and so proves it.

        Raises:
            ArtifactError: as ``row``.
        """
        for index in range(self.rows):
            self.row(index)

    def digest(self) -> str:
        """SHA-256 (32 hex digits) of all rows; reads every byte."""
        total = hashlib.sha256()
        for index in range(self.rows):
            total.update(self.row(index).numpy().data)
        return total.hexdigest()[:32]


class _Ranges:
    """Rows of a block behind fsspec, ``(rows, width)``, each read when it is asked for."""

    def __init__(self, path: Remote, start: int, width: int, dtype: np.dtype[Any]) -> None:
        self._path, self._start, self._width, self._dtype = path, start, width, dtype
        self._file: BinaryIO = path.open()

    def __getitem__(self, within: int) -> np.ndarray[Any, Any]:
        size = self._width * self._dtype.itemsize
        try:
            self._file.seek(self._start + within * size)
            data = bytearray(self._file.read(size))
        except OSError as error:
            raise ArtifactError(f"{self._path}: cannot be read ({error})") from None
        if len(data) != size:
            raise ArtifactError(f"{self._path}: truncated or rewritten (row {within} is cut short)")
        return np.frombuffer(data, self._dtype)


def joint_hash(parts: list[str]) -> str:
    """One hash for several streams; a single stream's own."""
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def joined(parts: Sequence[Finished]) -> Finished:
    """Several streams as one."""
    return Finished(joint_hash([part.hash for part in parts]), {k: v for part in parts for k, v in part.sums.items()})


def _rows_in_first(folder: Place, stream: str) -> int:
    """How many rows the stream's first block is laid out for, as its own header says."""
    path = block_path(folder, stream, 0)
    bounded.check_header(path)
    try:
        with bounded.opened(path) as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return int(header[stream]["shape"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path}: truncated or not safetensors ({error})") from None


def _write_all(file: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    durable.on_operation("write", path)
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
