"""Which numbers make up one state of a model: every trained parameter and floating buffer, as one flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ArtifactError


@dataclass(frozen=True)
class Entry:
    """One named tensor's place in the vector. ``kind`` is ``"parameter"`` or ``"buffer"``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    kind: str

    @property
    def span(self) -> slice:
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Layout:
    """The order and shapes of a model's coordinates; ``total`` is their number, P."""

    entries: tuple[Entry, ...]

    @property
    def total(self) -> int:
        return self.entries[-1].span.stop if self.entries else 0

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Trained parameters first (tied ones once), then the floating-point buffers of the state dict.

        Buffers such as BatchNorm's running statistics move during training, so they are coordinates of the
        path; frozen parameters and integer buffers do not, and are kept once beside it (``fixed_state``).
        """
        saved = set(model.state_dict())
        named: list[tuple[str, Tensor, str]] = [
            (name, parameter, "parameter") for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        named += [
            (name, buffer, "buffer") for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()
        ]
        return cls._packed([(name, tuple(tensor.shape), kind) for name, tensor, kind in named])

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> Layout:
        return cls._packed([(row["name"], tuple(row["shape"]), row["kind"]) for row in rows])

    @classmethod
    def _packed(cls, rows: list[tuple[str, tuple[int, ...], str]]) -> Layout:
        entries, offset = [], 0
        for name, shape, kind in rows:
            size = int(torch.Size(shape).numel())
            entries.append(Entry(name, shape, offset, size, kind))
            offset += size
        return cls(tuple(entries))

    def to_json(self) -> list[dict[str, Any]]:
        return [{"name": e.name, "shape": list(e.shape), "kind": e.kind} for e in self.entries]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @property
    def parameters(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == "parameter")

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """``name -> view`` of a flat vector ``(P,)``; no copy."""
        return {entry.name: flat[entry.span].view(entry.shape) for entry in self.entries}

    def flatten(self, named: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Copies named tensors into one flat vector ``(P,)``.

        Raises:
            ArtifactError: a tensor is missing or has another shape.
        """
        if out is None:
            first = next(iter(named.values()), torch.empty(0))
            out = torch.empty(self.total, dtype=first.dtype, device=first.device)
        for entry in self.entries:
            tensor = named.get(entry.name)
            if tensor is None:
                raise ArtifactError(f"{entry.name}: not among the given tensors, which are {', '.join(list(named)[:8])}")
            if tuple(tensor.shape) != entry.shape:
                raise ArtifactError(f"{entry.name}: shape {tuple(tensor.shape)}, expected {entry.shape}")
            out[entry.span].copy_(tensor.detach().reshape(-1))
        return out

    def check(self, model: nn.Module) -> None:
        """Refuses a model whose coordinates are not these.

        Raises:
            ArtifactError: names the first difference.
        """
        other = Layout.of(model)
        if other == self:
            return
        mine = {entry.name: entry.shape for entry in self.entries}
        theirs = {entry.name: entry.shape for entry in other.entries}
        for name in [*mine, *theirs]:
            if mine.get(name) != theirs.get(name):
                raise ArtifactError(
                    f"the model is not the recorded one: {name} has shape {theirs.get(name, 'none (absent)')}, "
                    f"recorded {mine.get(name, 'none (absent)')}"
                )
        raise ArtifactError("the model is not the recorded one: its parameters come in another order")


def fixed_state(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """What the model needs beside the path: frozen parameters and integer buffers, tied names once."""
    moving = {entry.name for entry in layout}
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = set(model.state_dict())
    return {name: tensor.detach().clone() for name, tensor in named.items() if name not in moving and name in saved}
