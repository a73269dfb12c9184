"""A safetensors file read through an open stream, range by range: for files that no memory map reaches."""

from __future__ import annotations

import math
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prunekit import bounded

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class RangedFile:
    """What ``safetensors.safe_open`` gives, of a stream: header first, and of the rest what is asked for.

    Args:
        size: of the whole file, in bytes.

    Raises:
        ValueError: it is not a whole safetensors file.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, bounded.JSON):
            raise ValueError(f"a header of {length:,} bytes in {size:,}")
        header = bounded.parsed(file.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        self._metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self._metadata, dict) or not all(isinstance(text, str) for text in self._metadata.values()):
            raise ValueError("its metadata are no texts")
        self._begin, self._room = 8 + length, size - 8 - length
        self._tensors = {str(name): self._checked(name, facts) for name, facts in header.items()}

    def _checked(self, name: str, facts: Any) -> tuple[torch.dtype, list[int], int, int]:
        try:
            dtype, shape, (begin, end) = DTYPES[facts["dtype"]], facts["shape"], facts["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (LookupError, TypeError, ValueError):
            whole = False
        if not whole or end > self._room or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not where its header says, or of no type that is known")
        return dtype, shape, begin, end

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor; its bytes alone are read.

        Raises:
            ValueError: the stream ends before them.
        """
        dtype, shape, begin, end = self._tensors[name]
        self._file.seek(self._begin + begin)
        data = bytearray(self._file.read(end - begin))
        if len(data) != end - begin:
            raise ValueError(f"{name} is cut short")
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
