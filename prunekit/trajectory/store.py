"""Where the states lie: blocks of rows in safetensors files that are valid while they are still being filled."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import ArtifactError

HEADER_BYTES = 256  # length field + JSON padded with spaces, which the format allows; the rows begin aligned
BLOCK_BYTES = 256 * 2**20
NAMES: dict[np.dtype[Any], str] = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
DTYPES: dict[str, np.dtype[Any]] = {name: dtype for dtype, name in NAMES.items()}


def block_rows(row_bytes: int) -> int:
    """How many rows a block holds: 1 to 1,024, about 256 MiB."""
    return max(1, min(1024, BLOCK_BYTES // max(row_bytes, 1)))


def block_path(folder: Path, block: int) -> Path:
    return folder / f"states-{block:05d}.safetensors"


def _header(rows: int, width: int, dtype: np.dtype[Any]) -> bytes:
    facts = {"dtype": NAMES[dtype], "shape": [rows, width], "data_offsets": [0, rows * width * dtype.itemsize]}
    text = json.dumps({"states": facts}).encode()
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)


class StateWriter:
    """Appends rows of ``width`` numbers. Each block file is laid out in full (sparsely) before its first row,

    so that a process killed at any moment leaves safetensors files that open; how many rows count is the
    step log's to say. ``finish`` trims the last block.
    """

    def __init__(self, folder: Path, width: int, dtype: np.dtype[Any]) -> None:
        self.folder, self.width, self.dtype = folder, width, np.dtype(dtype)
        self.row_bytes = width * self.dtype.itemsize
        self.rows_per_block = block_rows(self.row_bytes)
        self.rows = 0
        self._hash = hashlib.sha256()
        self._file: int | None = None

    def append(self, row: np.ndarray) -> None:
        """Writes one state.

        Raises:
            OSError: the disk is full; rows written before stay readable.
        """
        within = self.rows % self.rows_per_block
        if within == 0:
            self._close()
            self._file = os.open(self._path(), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            _write_all(self._file, _header(self.rows_per_block, self.width, self.dtype), 0)
            os.ftruncate(self._file, HEADER_BYTES + self.rows_per_block * self.row_bytes)
        assert self._file is not None
        data = np.ascontiguousarray(row, dtype=self.dtype).data.cast("B") if self.width else memoryview(b"")
        _write_all(self._file, data, HEADER_BYTES + within * self.row_bytes)
        self._hash.update(data)
        self.rows += 1

    def _path(self) -> Path:
        return block_path(self.folder, self.rows // self.rows_per_block)

    def finish(self) -> str:
        """Trims the last block to its rows and returns the SHA-256 (32 hex digits) of all rows."""
        if self._file is not None:
            rows = (self.rows - 1) % self.rows_per_block + 1
            os.ftruncate(self._file, HEADER_BYTES + rows * self.row_bytes)
            _write_all(self._file, _header(rows, self.width, self.dtype), 0)
            os.fsync(self._file)
        self._close()
        return self._hash.hexdigest()[:32]

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class StateReader:
    """Rows by memory map: reading one touches only its own pages."""

    def __init__(self, folder: Path, width: int, dtype: str, rows: int, rows_per_block: int) -> None:
        self.folder, self.width, self.dtype = folder, width, DTYPES[dtype]
        self.rows, self.rows_per_block = rows, rows_per_block
        self._blocks: dict[int, np.ndarray] = {}
        row_bytes = width * self.dtype.itemsize
        for block in range(-(-rows // rows_per_block)):
            needed = min(rows_per_block, rows - block * rows_per_block)
            path = block_path(folder, block)
            if not path.is_file():
                raise ArtifactError(f"{path}: no such file, though the trajectory has {rows} states")
            if path.stat().st_size < HEADER_BYTES + needed * row_bytes:
                raise ArtifactError(f"{path}: truncated ({path.stat().st_size} bytes, {needed} states expected)")

    def row(self, index: int) -> Tensor:
        """State ``index`` as ``(P,)``, backed by the file; writing to it does not change the file."""
        block, within = divmod(index, self.rows_per_block)
        if block not in self._blocks:
            self._blocks.clear()  # one open map at a time: long trajectories have more blocks than file handles
            path = block_path(self.folder, block)
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            needed = min(self.rows_per_block, self.rows - block * self.rows_per_block)
            if path.stat().st_size < start + needed * self.width * self.dtype.itemsize:
                raise ArtifactError(f"{path}: truncated or rewritten ({path.stat().st_size} bytes)")
            self._blocks[block] = np.memmap(path, self.dtype, mode="c", offset=start, shape=(needed, self.width))
        return torch.from_numpy(self._blocks[block][within])

    def digest(self) -> str:
        """SHA-256 (32 hex digits) of all rows; reads every byte."""
        total = hashlib.sha256()
        for index in range(self.rows):
            total.update(self.row(index).numpy().data)
        return total.hexdigest()[:32]


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
