"""Sums over the inputs of several layers in one pass; layers that are given the same tensor share one sum.

Where several ranks share the samples, each passes its own, and the sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunekit.criteria.layer_inputs import Layer, add_up, of_products, of_squares, reaching, rows, twins_among

KINDS: dict[str, Callable[[Tensor], Tensor]] = {"squares": of_squares, "products": of_products}


def summed(layers: Mapping[str, Sequence[Layer]], kind: str | None, batches: Sequence[Callable[[], None]]) -> dict[str, Tensor]:
    """``Σ x²`` or ``Σ x xᵀ`` by parameter, of those that any input reaches; the same tensor for layers with the same inputs.

    Args:
        kind: a key of ``KINDS``; with None nothing runs.
        batches: each passes some of this rank's samples through the layers when it is called.
    """
    if kind is None:
        return {}
    sums: dict[str, Tensor] = {}
    twins = twins_among(layers, batches[0])

    def add(name: str, layer: Layer, x: Tensor) -> None:
        if name in twins:
            return
        for piece in rows(layer, x, precision(x)):
            found = KINDS[kind](piece)
            sums[name] = sums[name].add_(found) if name in sums else found

    for run in batches:
        with reaching(layers, add):
            run()
    weight = next(iter(layers.values()))[0].weight
    assert isinstance(weight, Tensor)
    add_up(sums, weight.device, precision(weight))
    return sums | {name: sums[twin] for name, twin in twins.items() if twin in sums}


def precision(x: Tensor) -> torch.dtype:
    """What sums and solutions are computed in: double, or on an accelerator, where that is slow, the model's own or single."""
    return torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32
