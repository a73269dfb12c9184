"""Block influence: ``1 - mean cos(h_in, h_out)`` over samples and positions (ShortGPT: Men et al. 2024, arXiv 2403.03853).

How much a residual block turns the hidden state that it is given. A hidden state is what lies along the last axis, in blocks that
hold convolutions along the second. Blocks of the structure ``layers`` alone. The paper removes those of the lowest: allocation
``global``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import ranks
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.layer_inputs import TRANSPOSED, WITH_INPUTS
from prunekit.criteria.units import scored_units, units_of
from prunekit.measure.macs import unfused
from prunekit.structure.replacements import first_tensor


def _influence(evidence: Evidence) -> CriterionResult:
    groups = units_of(evidence, "layers")
    model, device, run = evidence.passing()
    sums = {group.name: torch.zeros(2, dtype=torch.float64, device=device) for group in groups}
    hooks = []
    for group in groups:
        block = model.get_submodule(group.name)
        axis = 1 if any(isinstance(module, (*WITH_INPUTS[1:], *TRANSPOSED)) for module in block.modules()) else -1

        entered: list[Tensor] = []  # blocks may change in place what they are given

        def enter(module: nn.Module, args: Any, keywords: Any, entered: list[Tensor] = entered) -> None:
            given = first_tensor(args, keywords)
            assert given is not None
            entered.append(given.clone())

        def leave(
            module: nn.Module, args: Any, out: Any, name: str = group.name, axis: int = axis, entered: list[Tensor] = entered
        ) -> None:
            given, made = entered.pop(), out[0] if isinstance(out, tuple) else out
            alike = F.cosine_similarity(given.double(), made.double(), dim=axis)
            sums[name] += torch.stack([alike.sum(), alike.new_tensor(alike.numel())])

        hooks += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        with torch.no_grad(), unfused(), evidence.shared() as samples:
            run(samples)
            ranks.add_up(sums.values())
    finally:
        for hook in hooks:
            hook.remove()
    return scored_units(evidence, groups, {name: _turned(*found) for name, found in sums.items()})


def _turned(alike: Tensor, count: Tensor) -> Tensor:
    """One score, ``(1,)``; rounding must not take it below 0."""
    return (1 - alike / count).clamp_min(0)[None]


CRITERION = Criterion(
    _influence,
    "how much a block turns its hidden states (ShortGPT, arXiv 2403.03853)",
    needs_data=True,
    spreads=True,
    group="sum",
    aggregation="l1",
    structure="layers",
)
