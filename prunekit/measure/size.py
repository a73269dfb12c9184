"""How large a model is: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import zlib
from typing import BinaryIO

import torch
from torch import Tensor, nn

from prunekit.batch import Inputs
from prunekit.errors import UsageError
from prunekit.measure.macs import macs
from prunekit.measure.undisturbed import placed, undisturbed
from prunekit.progress import Bar

PIECE = 2**20


def sizes(model: nn.Module, sample: Inputs) -> dict[str, int]:
    """``parameters``, ``nonzero`` (parameters other than 0) and ``macs`` of one sample.

    MACs are theoretical: what dense kernels compute, zeros included (``prunekit.measure.macs``). Tied weights count once. The
    model is left as it is, training mode included; the sample is taken to its device and type.

    Args:
        sample: one sample with its batch axis, ``(1, ...)``, as the model is called with it (``prunekit.batch``).

    Raises:
        UsageError: the model's weights are not there (meta device).
    """
    parameters, nonzero = _counted(list(model.parameters()))
    with undisturbed(model):
        found = macs(model, placed(model, sample))
    return {"parameters": parameters, "nonzero": nonzero, "macs": found}


def in_memory(model: nn.Module) -> int:
    """Bytes of the model's tensors, buffers too, tied ones once."""
    found = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def zipped(file: BinaryIO, size: int) -> int:
    """Bytes that DEFLATE makes of a file (zlib, level 6), as in a zip archive: what zeros save where a model lies or travels.

    Args:
        size: of the file in bytes, for the progress bar.
    """
    compressor, total = zlib.compressobj(6), 0
    with Bar("zip", size) as bar:
        while piece := file.read(PIECE):
            total += len(compressor.compress(piece))
            bar.advance(len(piece))
    return total + len(compressor.flush())


@torch.no_grad()
def _counted(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """How many numbers, and how many other than 0; a place in memory that several parameters look at counts once."""
    stored: dict[tuple[torch.device, int], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.is_meta:
            raise UsageError("a model on the meta device has no weights to count; give it to a device first (to_empty, load)")
        if parameter.numel():
            stored.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(parameter.detach())
    total = nonzero = 0
    for (device, _), views in stored.items():
        if len(views) > 1:
            length = max(v.untyped_storage().nbytes() // v.element_size() for v in views)
            seen, other = (torch.zeros(length, dtype=torch.bool, device=device) for _ in range(2))
            for view in views:
                places = view.shape, view.stride(), view.storage_offset()
                seen.as_strided(*places).fill_(True)
                other.as_strided(*places).copy_(view != 0)
            total, nonzero = total + int(seen.sum()), nonzero + int(other.sum())
        else:
            total, nonzero = total + views[0].numel(), nonzero + int((views[0] != 0).sum())
    return total, nonzero
