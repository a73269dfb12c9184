"""The hidden states of all samples between two blocks: in memory as far as a budget goes, the others in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from prunekit.batch import mapped
from prunekit.blocks.stacks import Call, first_tensor, hidden_of, with_hidden
from prunekit.checkpoint import raw
from prunekit.errors import ArtifactError


class Hidden:
    """Tensors by number, of which those beyond ``most`` bytes lie in a file without a name, which goes with the process.

    Args:
        device: where they are given back.
        most: bytes in memory; with ``folder`` None all are.
        folder: where the file lies.
    """

    def __init__(self, device: torch.device, most: int, folder: Path | None) -> None:
        self._device, self._left, self._folder = device, most, folder
        self._places: list[Tensor | _Place] = []
        self._file: BinaryIO | None = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, tensor: Tensor) -> None:
        """The next one."""
        if self._folder is None or tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._places.append(tensor.to(self._device))
        else:
            self._places.append(self._written(tensor, self._end))

    def __getitem__(self, number: int) -> Tensor:
        place = self._places[number]
        if isinstance(place, Tensor):
            return place.clone()  # a block may change it in place
        found = torch.empty(place.shape, dtype=place.dtype)
        file = self._opened()
        file.seek(place.begin)
        if file.readinto(raw(found)) != found.nbytes:  # type: ignore[attr-defined]
            raise ArtifactError(f"{self._folder}: hidden states are no longer there")
        return found.to(self._device)

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        place = self._places[number]
        if isinstance(place, Tensor):
            self._places[number] = tensor
        else:
            fits = tensor.nbytes <= place.bytes
            self._places[number] = self._written(tensor, place.begin if fits else self._end)

    def _written(self, tensor: Tensor, begin: int) -> _Place:
        here = tensor.detach().cpu().contiguous()
        try:
            file = self._opened()
            file.seek(begin)
            file.write(raw(here))
            file.flush()
        except OSError as error:
            raise ArtifactError(f"{self._folder}: hidden states could not be written ({error.strerror or error})") from None
        self._end = max(self._end, begin + here.nbytes)
        return _Place(begin, here.nbytes, here.shape, here.dtype)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (as long as this lives)
        return self._file


@dataclass(frozen=True)
class _Place:
    begin: int
    bytes: int
    shape: torch.Size
    dtype: torch.dtype


ACTIVATIONS = 2**31
"""Bytes of activations that are held unless told."""
ROWS = 2**13
"""Rows of hidden states that run through a block at a time at most, or one sample's."""
BATCH = 2**23
"""Bytes that they take at most, since what a block computes of them comes on top, some ten times as much."""


def at_once(hidden: Tensor) -> int:
    """How many samples run through a block at a time, by one's hidden states."""
    rows, width = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    return max(1, min(ROWS, BATCH // (width * hidden.itemsize)) // rows)


@dataclass
class Held:
    """The inputs of the block whose turn it is, and what else blocks are called with, for all samples.

    Attributes:
        hidden: by batch.
        calls: by batch and block, the hidden states left out.
        bytes: of all tensors.
    """

    device: torch.device
    hidden: Hidden
    calls: list[list[Call]] = field(default_factory=list)
    bytes: int = 0
    shared: list[Tensor] = field(default_factory=list)

    def add(self, calls: Sequence[Call]) -> None:
        """One batch's; a tensor that blocks share, or an equal one of the batch before, is held once."""
        hidden = hidden_of(calls[0])
        assert hidden is not None
        moved_ones: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved_ones:
                here, known_ones = tensor.to(self.device), (*moved_ones.values(), *self.shared)
                alike = (old for old in known_ones if old.shape == here.shape and old.dtype == here.dtype)
                known = next((old for old in alike if torch.equal(old, here)), None)
                self.bytes += 0 if known is not None else here.nbytes
                moved_ones[id(tensor)] = here if known is None else known
            return moved_ones[id(tensor)]

        rest = [mapped(with_hidden(each, hidden[:0]), keep) for each in calls]
        self.shared = list(moved_ones.values())
        self.calls.append(rest)
        self.hidden.add(hidden)
        self.bytes += hidden.nbytes

    def run(self, blocks: Sequence[nn.Module], numbers: Sequence[int], batch: int) -> Tensor:
        """These of a stack's blocks, one after the other, on a batch; the hidden states of the last."""
        hidden = self.hidden[batch]
        for number in numbers:
            hidden = self.of(blocks[number], number, batch, hidden)
        return hidden

    def of(self, block: nn.Module, number: int, batch: int, hidden: Tensor) -> Tensor:
        """The same on other hidden states of that batch."""
        args, kwargs = with_hidden(self.calls[batch][number], hidden)
        found = first_tensor(block(*args, **kwargs))
        assert found is not None
        return found
