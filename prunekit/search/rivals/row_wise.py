"""Each layer on its own, row by row: all that layer-wise rivals see is what goes into a layer of the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.criteria.layer_inputs import WITH_INPUTS, watching
from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights


@dataclass(frozen=True)
class Inputs:
    """Sums over samples and positions, float64: their number, ``Σ a`` ``(inputs,)`` and ``Σ a aᵀ`` ``(inputs, inputs)``."""

    count: int
    total: Tensor
    gram: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.gram.diagonal() / self.count - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """``‖a_k‖₂`` of every input, ``(inputs,)``."""
        return self.gram.diagonal().sqrt()


@torch.no_grad()
def inputs_of(objective: Objective) -> dict[str, Inputs]:
    """By the name of its weight, for every Linear and ungrouped convolution; patches of a convolution as its inputs."""
    function, found = objective.function, dict[str, Inputs]()

    def add(name: str, rows: Tensor) -> None:
        a = rows[0]
        here = Inputs(len(a), a.sum(0), a.t() @ a)
        seen = found.get(name)
        found[name] = Inputs(seen.count + here.count, seen.total + here.total, seen.gram + here.gram) if seen else here

    layers = {
        f"{path}.weight".removeprefix("."): layer
        for path, layer in function.model.named_modules()
        if isinstance(layer, WITH_INPUTS) and (isinstance(layer, nn.Linear) or layer.groups == 1)
    }
    with watching(layers, add):
        for x, y in objective.learn:
            function(objective.theta, x, y)
    return found


def row_by_row(pattern: Weights, objective: Objective, better: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Tensor:
    """The plan's mask ``(U,)`` with each handled layer's own replaced; other layers keep the plan's.

    Args:
        better: weights, mask, both ``(rows, inputs)``, and the layer's inputs -> mask.
    """
    views = objective.function.layout.views(objective.theta)
    inputs, keep = inputs_of(objective), dict(pattern.plan(pattern.keep).keep)
    for name in keep.keys() & inputs.keys():
        mask, device = keep[name], views[name].device
        keep[name] = better(views[name].flatten(1).double(), mask.to(device).flatten(1), inputs[name]).view(mask.shape)
    return torch.cat([keep[name].flatten().to(pattern.keep.device) for name in pattern.names])
