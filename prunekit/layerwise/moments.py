"""Sums over the inputs of several layers in one pass; layers that are given the same tensor share one sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from prunekit.criteria.layer_inputs import Layer, by_features, of_products, of_squares, reaching, rows

KINDS: dict[str, Callable[[Tensor], Tensor]] = {"squares": of_squares, "products": of_products}


def summed(layers: Mapping[str, Sequence[Layer]], kind: str | None, batches: Iterable[Callable[[], None]]) -> dict[str, Tensor]:
    """``Σ x²`` or ``Σ x xᵀ`` by parameter, of those that any input reaches; the same tensor for layers with the same inputs.

    Args:
        kind: a key of ``KINDS``; with None nothing runs.
        batches: each passes some samples through the layers when it is called.
    """
    sums: dict[str, Tensor] = {}
    twins: dict[str, str] | None = None

    def add(name: str, layer: Layer, x: Tensor) -> None:
        if twins and name in twins:
            return
        for piece in rows(layer, x, precision(x)):
            found = KINDS[str(kind)](piece)
            sums[name] = sums[name].add_(found) if name in sums else found

    for run in batches if kind is not None else ():
        if twins is None:
            twins = _twins(layers, run)
        with reaching(layers, add):
            run()
    return sums | {name: sums[twin] for name, twin in (twins or {}).items() if twin in sums}


def _twins(layers: Mapping[str, Sequence[Layer]], run: Callable[[], None]) -> dict[str, str]:
    """Linear layers whose one input is the very tensor that an earlier one got, and that one."""
    seen: dict[str, list[Tensor]] = {}  # all held until the end, so that none comes to lie where another lay
    with reaching(layers, lambda name, layer, x: seen.setdefault(name, []).append(x)):
        run()
    once = [name for name, inputs in seen.items() if len(inputs) == 1 and by_features(layers[name][0])]
    found: dict[str, str] = {}
    for number, name in enumerate(once):
        same = (n for n in once[:number] if n not in found and _one(seen[n][0], seen[name][0]))
        if (twin := next(same, None)) is not None:
            found[name] = twin
    return found


def _one(x: Tensor, other: Tensor) -> bool:
    return bool(x.numel()) and x.data_ptr() == other.data_ptr() and x.shape == other.shape and x.stride() == other.stride()


def precision(x: Tensor) -> torch.dtype:
    """What sums and solutions are computed in: double, or on an accelerator, where that is slow, the model's own or single."""
    return torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32
