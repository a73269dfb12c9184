"""Swaps that repair each layer's own outputs, row by row: SparseSwaps (arXiv 2512.10922), the exact form of DSnoT's idea.

For a row of a layer with weights w, removed part r and inputs of second moment G = Σ a aᵀ on the dense model, the error of
the layer's output is rᵀ G r. Giving back p and dropping q changes it by

    -2 w_p (G r)_p + w_p² G_pp + 2 w_q (G r)_q + w_q² G_qq - 2 w_p w_q G_pq

and the pair that lowers it most is swapped until none does. Sparsity of every row stays what the plan gave it.
Linear and ungrouped convolutions; other layers keep the plan's mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights
from prunekit.search.rivals.row_wise import row_by_row

ELEMENTS = 2**24  # of the pair table held at a time


def layer_swaps(pattern: Weights, objective: Objective, seed: int = 0, *, swaps: int = 100) -> Tensor:
    """The plan's mask after at most ``swaps`` swaps a row; no gradient is taken."""
    return row_by_row(pattern, objective, lambda weights, keep, inputs: swap_rows(weights, keep, inputs.gram, swaps))


def swap_rows(weights: Tensor, keep: Tensor, moment: Tensor, swaps: int) -> Tensor:
    """Masks ``(rows, inputs)`` after the best swaps of each row; ``moment`` ``(inputs, inputs)``; all float64."""
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
