"""Which numbers make up one state of a model: every trained parameter and floating buffer, as one flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ArtifactError, UsageError
from prunekit.trajectory.bare import bare, named_tensors
from prunekit.trajectory.ties import refuse_overlaps

ORIGINAL = "_orig"  # what torch.nn.utils.prune appends to the name of a weight that it masks


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
    def of(cls, model: nn.Module, *, spread: bool = False) -> Layout:
        """Trained parameters first (tied ones once), then the floating-point buffers of the state dict.

        Buffers such as BatchNorm's running statistics move during training, so they are coordinates of the
        path; frozen parameters and integer buffers do not, and are kept once beside it (``fixed_state``).

        Args:
            spread: also of parameters that are spread over processes (DTensor), in their whole shapes.

        Raises:
            UsageError: a parameter has no real numbers of its own here (complex, lazy, spread over devices).
            StructureError: a trained parameter shares memory with another tensor without being the same one.
        """
        model = bare(model)
        saved = set(model.state_dict())
        named: list[tuple[str, Tensor, str]] = [
            (name, parameter, "parameter") for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        _check_kinds({name: parameter for name, parameter, _ in named}, spread)
        named += [
            (name, buffer, "buffer") for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()
        ]
        refuse_overlaps(model)
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
        """Copies named tensors into one flat vector ``(P,)``: float64 where a trained parameter is, else float32.

        A weight under a mask of torch.nn.utils.prune counts as what it computes with: 0 where it is masked.

        Raises:
            ArtifactError: a tensor is missing or has another shape.
        """
        if out is None:
            device = next((tensor.device for tensor in named.values()), torch.device("cpu"))
            double = any(e.name in named and named[e.name].dtype == torch.float64 for e in self.parameters)
            out = torch.empty(self.total, dtype=torch.float64 if double else torch.float32, device=device)
        for entry in self.entries:
            tensor = named.get(entry.name)
            if tensor is None:
                raise ArtifactError(f"{entry.name}: not among the given tensors, which are {', '.join(list(named)[:8])}")
            if tuple(tensor.shape) != entry.shape:
                raise ArtifactError(f"{entry.name}: shape {tuple(tensor.shape)}, expected {entry.shape}")
            out[entry.span].copy_(tensor.detach().reshape(-1))
            mask = named.get(mask_of(entry.name)) if entry.name.endswith(ORIGINAL) else None
            if mask is not None and mask.shape == tensor.shape:
                out[entry.span].mul_(mask.detach().reshape(-1).to(out))
        return out

    def state(self, model: nn.Module) -> Tensor:
        """The model's own state, flat ``(P,)``; see ``flatten``."""
        return self.flatten(named_tensors(model))

    def check(self, model: nn.Module, *, spread: bool = False) -> None:
        """Refuses a model whose coordinates are not these; ``spread``: as in ``of``.

        Raises:
            ArtifactError: names the first difference.
        """
        model = bare(model)
        refuse_meta(model)
        other = Layout.of(model, spread=spread)
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


def refuse_meta(model: nn.Module) -> None:
    """Raises UsageError where a model has shapes alone."""
    if meta := next((name for name, tensor in named_tensors(model).items() if tensor.is_meta), None):
        placed = any(hasattr(module, "_hf_hook") for module in bare(model).modules())
        why = (
            "accelerate has put it elsewhere; load it without device_map, or see prunekit compress --layerwise METHOD --offload"
            if placed
            else "build it on the CPU"
        )
        raise UsageError(f"the model has no numbers: {meta} is on the meta device; {why}")


def path_dtype(model: nn.Module) -> torch.dtype:
    """What a path of ``model`` is kept and scored in: float64 where a parameter is, float32 for all else."""
    return torch.float64 if any(p.dtype == torch.float64 for p in bare(model).parameters()) else torch.float32


@torch.no_grad()
def as_path(model: nn.Module, dtype: torch.dtype) -> None:
    """Widens every floating-point parameter and buffer of ``model`` that is narrower than ``dtype``, in place."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.element_size() < dtype.itemsize:
            tensor.data = tensor.data.to(dtype)


def mask_of(name: str) -> str:
    """The buffer in which torch.nn.utils.prune keeps the mask of a weight ``<name>_orig``."""
    return name.removesuffix(ORIGINAL) + "_mask"


def fixed_state(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """What the model needs beside the path: frozen parameters and integer buffers, tied names once."""
    moving = {entry.name for entry in layout}
    saved = set(bare(model).state_dict())
    return {
        name: tensor.detach().clone() for name, tensor in named_tensors(model).items() if name not in moving and name in saved
    }


def _check_kinds(parameters: Mapping[str, Tensor], spread: bool) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UsageError(f"{name} has no shape yet (a lazy layer); call the model once on a batch before this")
        if parameter.is_complex():
            raise UsageError(f"{name} is {parameter.dtype}; a path is made of real numbers, keep real and imaginary parts apart")
        if hasattr(parameter, "full_tensor") and not spread:
            raise UsageError(f"{name} is spread over devices (DTensor); gather the model's weights (full_tensor) first")
        if parameter.layout != torch.strided:
            raise UsageError(f"{name} is stored sparsely ({parameter.layout}); make it dense (to_dense) first")
