"""REAP: what an expert adds where it is asked (Lasby et al. 2025, arXiv 2510.13999).

``S_e = mean over the tokens routed to e of g_e(x) ‖f_e(x)‖₂``: the router's weight, as it multiplies the expert's output
(normalised over the chosen ones where the model does so), times the norm of the output. An expert that no token goes to scores
0. Experts of the structure ``experts`` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.units import scored_units, units_of
from prunekit.errors import PrunekitError
from prunekit.structure.families import experts_of
from prunekit.structure.routing import routed_of


def _reap(evidence: Evidence) -> CriterionResult:
    groups = units_of(evidence, "experts")
    banks = {name: bank for name, _, _, bank in experts_of(evidence.model, evidence.attention)}
    model, device, run = evidence.passing()
    sums = {g.name: torch.zeros(2, g.size, dtype=torch.float64, device=device) for g in groups}
    hooks = []
    for group in groups:

        def see(module: nn.Module, args: Any, keywords: Any, name: str = group.name) -> None:
            _add(sums[name], module, args, keywords, banks[name])

        hooks.append(model.get_submodule(banks[group.name]).register_forward_pre_hook(see, with_kwargs=True))
    try:
        with torch.no_grad(), evidence.shared() as samples:
            run(samples)
            ranks.add_up(sums.values())
    finally:
        for hook in hooks:
            hook.remove()
    return scored_units(evidence, groups, {name: total / tokens.clamp_min(1) for name, (total, tokens) in sums.items()})


def _add(sums: Tensor, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], name: str) -> None:
    """Adds ``Σ g ‖f‖`` and the number of tokens, by expert; each choice of a token is run once more by itself, with weight 1.

    Raises:
        PrunekitError: the experts are not called with hidden states, the experts chosen and their weights.
    """
    routed = routed_of(args, keywords)
    if routed is None:
        given = (value for value in (*args, *keywords.values()) if isinstance(value, Tensor))
        shapes = ", ".join(f"{tuple(value.shape)} of {value.dtype}" for value in given)
        raise PrunekitError(
            f"reap: {name} ({type(module).__name__}) is called with {shapes}; it must be called with hidden states, the "
            "numbers of the experts chosen for each token, and their weights of the same shape"
        )
    chosen, weights = routed.chosen, routed.weights
    for k in range(chosen.shape[-1]):
        one, weight = chosen[..., k : k + 1], weights[..., k : k + 1]
        swap = {id(chosen): one, id(weights): torch.ones_like(weight)}
        out = module.forward(
            *(swap.get(id(value), value) for value in args), **{key: swap.get(id(v), v) for key, v in keywords.items()}
        )
        sizes = out.double().norm(dim=-1).flatten() * weight.double().flatten()
        known = one.flatten() < sums.shape[1]  # a router of a pruned model may send a token nowhere
        where = one.flatten()[known]
        sums[0].index_add_(0, where, sizes[known])
        sums[1].index_add_(0, where, torch.ones_like(sizes[known]))


CRITERION = Criterion(
    _reap,
    "router weight times norm of the expert's output (REAP, arXiv 2510.13999)",
    needs_data=True,
    spreads=True,
    group="sum",
    aggregation="l1",
    structure="experts",
)
