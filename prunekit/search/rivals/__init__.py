"""Other ways to a mask of the same size, to measure refine against: a plain dict from name to function, one file each.

They take single weights only (``Weights``) and what ``refine`` takes: the same objective, the same samples.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights
from prunekit.search.rivals.dsnot import dsnot
from prunekit.search.rivals.edge_popup import edge_popup
from prunekit.search.rivals.gumbel_gates import gumbel_gates
from prunekit.search.rivals.integrated_gradients import integrated_gradients
from prunekit.search.rivals.layer_swaps import layer_swaps
from prunekit.search.rivals.rescored import rescored, tempered

Rival = Callable[[Weights, Objective, int], Tensor]
"""``(pattern, objective, seed) -> mask (U,)`` that keeps as many weights as the pattern's plan."""

RIVALS: dict[str, Rival] = {
    "tempered": tempered,
    "rescored": rescored,
    "integrated-gradients": integrated_gradients,
    "dsnot": dsnot,
    "layer-swaps": layer_swaps,
    "edge-popup": edge_popup,
    "gumbel-gates": gumbel_gates,
}

__all__ = ["RIVALS", "Rival"]
