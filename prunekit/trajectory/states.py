"""How states become rows: whole, or as half-precision differences with the error fed back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.remote import Place
from prunekit.trajectory.store import NAMES, Finished, RowReader, RowWriter, joined, joint_hash

Sums = Mapping[str, Tensor] | None
BASE_EVERY = 64  # differences between two whole states: what a reader adds up at most to reach a state


class WholeWriter:
    """4 bytes a coordinate (8 for float64)."""

    def __init__(self, folder: Path, width: int, dtype: np.dtype[Any], rows: int = 0) -> None:
        self._rows = RowWriter(folder, "states", width, dtype, rows=rows)

    def append(self, state: np.ndarray[Any, Any]) -> None:
        self._rows.append(state)

    def finish(self) -> Finished:
        return self._rows.finish()


class WholeReader:
    def __init__(self, folder: Place, width: int, dtype: np.dtype[Any], rows: int, sums: Sums = None) -> None:
        self._rows = RowReader(folder, "states", width, NAMES[dtype], rows, sums)

    def state(self, row: int) -> Tensor:
        return self._rows.row(row)

    def read(self) -> None:
        self._rows.read()

    def digest(self) -> str:
        return self._rows.digest()


class DifferenceWriter:
    """2 bytes a coordinate, and a whole state every ``BASE_EVERY`` rows.

    What is stored is the difference to what a *reader* will have by then, scaled to its largest entry, so rounding
    errors do not add up along the path. Halving the states themselves would lose the steps altogether.
    """

    def __init__(self, folder: Path, width: int, dtype: np.dtype[Any], rows: int = 0) -> None:
        differences = rows - 1 - (rows - 1) // BASE_EVERY if rows else 0
        bases = (rows - 1) // BASE_EVERY + 1 if rows else 0
        reader = DifferenceReader(folder, width, dtype, rows) if rows else None
        self._read = reader.state(rows - 1).numpy().copy() if reader else np.zeros(width, dtype)
        self._count = rows
        self._bases = RowWriter(folder, "bases", width, dtype, rows=bases)
        self._differences = RowWriter(folder, "differences", width, np.dtype(np.float16), rows=differences)
        self._scales = RowWriter(folder, "scales", 1, np.dtype(np.float64), rows=differences)

    def append(self, state: np.ndarray[Any, Any]) -> None:
        if self._count % BASE_EVERY == 0:
            self._read = state.copy()
            self._bases.append(state)
        else:
            difference = state - self._read
            scale = float(np.abs(difference).max()) or 1.0
            half = (difference / scale).astype(np.float16)
            self._scales.append(np.array([scale]))
            self._differences.append(half)
            self._read = _add(self._read, half, scale)
        self._count += 1

    def finish(self) -> Finished:
        return joined([w.finish() for w in (self._bases, self._differences, self._scales)])


class DifferenceReader:
    def __init__(self, folder: Place, width: int, dtype: np.dtype[Any], rows: int, sums: Sums = None) -> None:
        bases = (rows - 1) // BASE_EVERY + 1

        def reader(stream: str, width: int, kind: np.dtype[Any], count: int) -> RowReader:
            return RowReader(folder, stream, width, NAMES[kind], count, sums)

        self._bases = reader("bases", width, dtype, bases)
        self._differences = reader("differences", width, np.dtype(np.float16), rows - bases)
        self._scales = reader("scales", 1, np.dtype(np.float64), rows - bases)
        self._last: tuple[int, np.ndarray[Any, Any]] | None = None

    def state(self, row: int) -> Tensor:
        base = row // BASE_EVERY
        first = base * BASE_EVERY
        if self._last is not None and first <= self._last[0] <= row:
            at, state = self._last
        else:
            at, state = first, self._bases.row(base).numpy().copy()
        for index in range(at, row):
            number = index - base  # one base in every BASE_EVERY rows has no difference of its own
            state = _add(state, self._differences.row(number).numpy(), float(self._scales.row(number)[0]))
        self._last = (row, state)
        return torch.from_numpy(state.copy())

    def read(self) -> None:
        for stream in (self._bases, self._differences, self._scales):
            stream.read()

    def digest(self) -> str:
        return joint_hash([r.digest() for r in (self._bases, self._differences, self._scales)])


def _add(state: np.ndarray[Any, Any], half: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    """Writer and reader must add alike, bit for bit."""
    moved: np.ndarray[Any, Any] = state + (half.astype(state.dtype) * state.dtype.type(scale))
    return moved


WRITERS: dict[str, type[WholeWriter] | type[DifferenceWriter]] = {"whole": WholeWriter, "half": DifferenceWriter}
READERS: dict[str, type[WholeReader] | type[DifferenceReader]] = {"whole": WholeReader, "half": DifferenceReader}
