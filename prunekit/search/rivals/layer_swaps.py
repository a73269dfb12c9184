"""Swaps that repair each layer's own outputs, row by row: SparseSwaps (arXiv 2512.10922), the exact form of DSnoT's idea.

For a row of a layer with weights w, removed part r and inputs of second moment G = Σ a aᵀ on the dense model, the error of
the layer's output is rᵀ G r. Giving back p and dropping q changes it by

    -2 w_p (G r)_p + w_p² G_pp + 2 w_q (G r)_q + w_q² G_qq - 2 w_p w_q G_pq

and the pair that lowers it most is swapped until none does. Sparsity of every row stays what the plan gave it.
Linear and ungrouped Conv2d; other layers keep the plan's mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.search.objective import Objective
from prunekit.search.patterns import Weights

ELEMENTS = 2**24  # of the pair table held at a time


def layer_swaps(pattern: Weights, objective: Objective, seed: int = 0, *, swaps: int = 100) -> Tensor:
    """The plan's mask after at most ``swaps`` swaps a row; no gradient is taken."""
    function = objective.function
    views = function.layout.views(objective.theta)
    plan = pattern.plan(pattern.keep)
    keep = {}
    moments = _second_moments(objective)
    for name, mask in plan.keep.items():
        keep[name] = mask
        if name in moments:
            rows = views[name].flatten(1)
            keep[name] = swap_rows(rows, mask.to(rows.device).flatten(1), moments[name], swaps).view(mask.shape)
    return torch.cat([keep[name].flatten().to(pattern.keep.device) for name in pattern.names])


def swap_rows(weights: Tensor, keep: Tensor, moment: Tensor, swaps: int) -> Tensor:
    """Masks ``(rows, inputs)`` after the best swaps of each row; ``moment`` ``(inputs, inputs)``."""
    weights, moment = weights.double(), moment.double()
    keep = keep.clone()
    block = max(1, ELEMENTS // moment.numel())
    for i in range(0, len(weights), block):
        w, mask = weights[i : i + block], keep[i : i + block]
        active = torch.arange(len(w), device=w.device)
        for _ in range(swaps):
            r = (w * ~mask)[active]
            own, linear = w[active].square() * moment.diagonal(), 2 * w[active] * (r @ moment)
            back = (own - linear).masked_fill(mask[active], torch.inf)
            out = (own + linear).masked_fill(~mask[active], torch.inf)
            change = back[:, :, None] + out[:, None, :]
            change -= 2 * w[active][:, :, None] * w[active][:, None, :] * moment
            lowest, where = change.flatten(1).min(1)
            better = lowest < -1e-12 * own.sum(1)
            if not better.any():
                break
            active, where = active[better], where[better]
            mask[active, where // w.shape[1]] = True
            mask[active, where % w.shape[1]] = False
        keep[i : i + block] = mask
    return keep


@torch.no_grad()
def _second_moments(objective: Objective) -> dict[str, Tensor]:
    """``Σ a aᵀ`` of every handled layer's inputs on the dense model, by the name of its weight."""
    function = objective.function
    found: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, a: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            pads = layer._reversed_padding_repeated_twice
            a = F.pad(a, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
            a = F.unfold(a, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
        a = a.reshape(-1, a.shape[-1]).double()
        found[name] = found.get(name, torch.zeros((), dtype=torch.float64, device=a.device)) + a.t() @ a

    hooks = []
    for path, layer in function.model.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            name = f"{path}.weight".removeprefix(".")
            hooks.append(layer.register_forward_pre_hook(lambda m, args, n=name: note(n, m, args[0])))
    try:
        for x, y in objective.learn:
            function(objective.theta, x, y)
    finally:
        for hook in hooks:
            hook.remove()
    return found
