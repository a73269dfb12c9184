"""Sums over the inputs of several layers in one pass; layers that are given the same tensor share one sum.

Where several ranks share the samples, each passes its own, and the sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.criteria.layer_inputs import Layer, add_up, by_features, of_products, of_squares, reaching, rows

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
    twins = _agreed(_twins(layers, batches[0]))

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


def _agreed(twins: dict[str, str]) -> dict[str, str]:
    """Those that every rank has found; of what some rank's first samples do not reach, each layer has a sum of its own."""
    every = ranks.gathered(twins)
    return {name: twin for name, twin in twins.items() if all(theirs.get(name) == twin for theirs in every)}


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
