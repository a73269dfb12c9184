"""Which tensors of a model share memory, and how: as one parameter under several names, or as views that torch trains apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunekit.errors import StructureError
from prunekit.trajectory.bare import named_tensors


def refuse_overlaps(model: nn.Module) -> None:
    """Refuses trained parameters that share memory with other tensors of the model without being the same object.

    One parameter under two names is tied everywhere: in copies, optimizers and files. Two parameters on one memory are tied
    only until the model is copied or moved; until then an optimizer moves them twice.

    Raises:
        StructureError: names both, says how they share, and what to do.
    """
    named = named_tensors(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for first, second, how in overlaps(named):
        if first in trained or second in trained:
            raise StructureError(
                f"{second} shares memory with {first} ({how}) but is not the same parameter, so copies and files of the model "
                f"would not keep them tied; {_remedy(first, second, how)}"
            )


def overlaps(named: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """``(first, second, how)`` of every two tensors that have an element in common.

    ``how`` is ``"the same view"``, ``"transposed"`` or ``"overlapping"``.
    """
    stored: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in named.items():
        own = tensor.layout == torch.strided and not tensor.is_meta and not _lazy(tensor) and not hasattr(tensor, "full_tensor")
        if own and tensor.numel():  # rows that are spread over processes have memory of their own
            stored.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    return [
        (first, second, how)
        for names in stored.values()
        for number, second in enumerate(names)
        for first in names[:number]
        if (how := _shared(named[first], named[second])) is not None
    ]


def tied(model: nn.Module) -> dict[str, list[str]]:
    """By state name, all names under which the model holds that very tensor; only where there are several."""
    groups: dict[str, list[str]] = {}
    named: dict[str, Tensor] = {}
    objects: dict[int, str] = {}
    for names in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in names:
            named[name] = tensor
            _join(groups, objects.setdefault(id(tensor), name), name)
    for first, second, how in overlaps(named):
        if how == "the same view":
            _join(groups, first, second)
    return groups


def _join(groups: dict[str, list[str]], first: str, second: str) -> None:
    if first == second or second in groups.get(first, ()):
        return
    joined = groups.get(first, [first]) + groups.get(second, [second])
    for name in joined:
        groups[name] = joined


def _shared(a: Tensor, b: Tensor) -> str | None:
    if a.data_ptr() == b.data_ptr() and a.dtype == b.dtype:
        if a.shape == b.shape and a.stride() == b.stride():
            return "the same view"
        if a.dim() > 1 and sorted(zip(a.shape, a.stride(), strict=True)) == sorted(zip(b.shape, b.stride(), strict=True)):
            return "transposed"
    spans = [_span(tensor) for tensor in (a, b)]
    if spans[0][0] >= spans[1][1] or spans[1][0] >= spans[0][1]:
        return None
    begin, end = min(low for low, _ in spans), max(high for _, high in spans)
    unit = 1 if a.element_size() != b.element_size() else a.element_size()
    touched = torch.zeros((end - begin) // unit, dtype=torch.uint8)
    places = torch.arange(len(touched))
    for bit, tensor, (low, _) in zip((1, 2), (a, b), spans, strict=True):
        step = tensor.element_size() // unit
        for byte in range(step):
            strides = [stride * step for stride in tensor.stride()]
            where = places.as_strided(tensor.shape, strides, (low - begin) // unit + byte).reshape(-1)
            touched[where] |= bit
    return "overlapping" if bool((touched == 3).any()) else None


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer)


def _remedy(first: str, second: str, how: str) -> str:
    if how == "the same view":
        return f"make it one parameter: model.{second} = model.{first}, or untie it with .clone()"
    if how == "transposed":
        return f"compute with model.{first}.t() in forward instead of a second parameter, or untie it with .clone()"
    return "give each its own memory with .clone()"
