"""Experts that make up for what a mixture lacks: least squares on the sum that its outputs enter, of all experts' last layers.

A token goes to several experts, whose shares of what is lacking only all of them together say, and their joint matrix has the
square of all their neurons. So each expert's own problem is solved, and all go as far along that as is best for the sum: a block
Jacobi step with an exact line search, ``ROUNDS`` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply.sums import following
from prunekit.blocks import Pair
from prunekit.criteria.layer_inputs import not_finite
from prunekit.structure.routing import Routed, routed_of

LAST = ".down_proj"
ROUNDS = 2
CLOSE = 1e-3
"""Of its largest output: how far a mixture may be from what its experts' layers say it computes."""


def mixture(module: nn.Module | None) -> bool:
    """Whether a module holds gated experts as transformers does: ``gate_up_proj`` and ``down_proj``, and nothing else."""
    held = dict(module.named_parameters()) if module is not None else {}
    if held.keys() != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
        return False
    up, down = held["gate_up_proj"], held["down_proj"]
    return up.dim() == down.dim() == 3 and (up.shape[1], up.shape[2]) == (2 * down.shape[2], down.shape[1])


@dataclass(frozen=True)
class _Seen:
    """One call of a mixture: what it gave, what that was added to, and what it was called with, as far as these are known."""

    out: Tensor
    added: Tensor | None
    routed: Routed | None

    def sum(self) -> Tensor:
        """``(tokens, outputs)``."""
        assert self.added is not None
        return (self.out.double() + self.added.view(self.out.shape).double()).flatten(0, -2)

    def parts(self, module: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every expert that is asked: its number, the tokens, and their neurons as its last layer meets them, weighted."""
        assert self.routed is not None
        for expert in range(len(module.down_proj)):
            tokens, place = torch.where(self.routed.chosen == expert)
            if len(tokens):
                gate, up = F.linear(self.routed.hidden[tokens], module.gate_up_proj[expert]).chunk(2, -1)
                x: Tensor = module.act_fn(gate) * up * self.routed.weights[tokens, place, None]
                yield expert, tokens, x.double()


def mend(
    pair: Pair,
    keep: Tensor,
    gone: Sequence[Sequence[nn.Module]],
    damping: float,
    divide: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Changes the other model's ``down_proj``, ``(experts, outputs, neurons)``.

    Nothing is changed where the outputs are added to nothing, or are others than the experts' layers say.

    Args:
        pair: of the mixture in two models.
        keep: of its weights; an expert whose outputs do not all keep the same neurons stays as it is.
        gone: layers that compute nothing any more, in each model.
        damping: as of ``layerwise``.
        divide: ``(matrix, right) -> matrix⁻¹ right``.
    """
    module: Any = pair.other[0]
    weight: Tensor = module.down_proj
    keep = keep.to(weight.device)
    neurons = keep.any(1)
    alike = (keep == neurons[:, None]).all(2).all(1).nonzero().flatten().tolist()
    if not all(ranks.gathered(_known(pair, gone))):
        return
    experts, outputs, width = weight.shape
    for _ in range(ROUNDS):
        gram = weight.new_zeros(experts, width, width, dtype=torch.float64)
        lacking = weight.new_zeros(experts, width, outputs, dtype=torch.float64)
        for short, call in _calls(pair, gone):
            for expert, tokens, x in call.parts(module):
                gram[expert].addmm_(x.T, x)
                lacking[expert].addmm_(x.T, short[tokens])
        ranks.add_up([gram, lacking])
        if not all(bool(each.isfinite().all()) for each in (gram, lacking)):
            raise not_finite(pair.names[0])
        step = torch.zeros_like(lacking)
        for expert in alike:
            asked = neurons[expert] & (gram[expert].diagonal() > 0)
            if bool(asked.any()):
                own = gram[expert][asked][:, asked]
                level = damping * own.diagonal().mean()
                eye = torch.eye(len(own), dtype=own.dtype, device=own.device)
                step[expert, asked] = divide(own + level * eye, lacking[expert][asked])
        weight.add_((_length(pair, gone, step) * step.transpose(1, 2)).to(weight))


def _length(pair: Pair, gone: Sequence[Sequence[nn.Module]], step: Tensor) -> Tensor:
    """How far along the step the sum comes nearest."""
    parts = step.new_zeros(2)
    for short, call in _calls(pair, gone):
        moved = torch.zeros_like(short)
        for expert, tokens, x in call.parts(pair.other[0]):
            moved.index_add_(0, tokens, x @ step[expert])
        parts += torch.stack([(moved * short).sum(), moved.square().sum()])
    ranks.add_up([parts])
    return parts[0] / parts[1].clamp_min(torch.finfo(parts.dtype).tiny)


def _calls(pair: Pair, gone: Sequence[Sequence[nn.Module]]) -> Iterator[tuple[Tensor, _Seen]]:
    """Every call of the pruned mixture, and what its sum lacks, ``(tokens, outputs)``."""
    for one, other in pair.batches:
        for wanted, found in zip(_seen(pair.one, one, gone[0]), _seen(pair.other, other, gone[1]), strict=True):
            yield wanted.sum() - found.sum(), found


def _seen(layers: Sequence[nn.Module], run: Callable[[], Any], gone: Sequence[nn.Module]) -> list[_Seen]:
    """Every call in a run."""
    calls: list[tuple[Any, Routed | None]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, named, out: calls.append(_noted(out, args, named)), with_kwargs=True)
        for layer in layers
    ]
    try:
        with following(layers, gone) as sums:
            sums.end(run())
    finally:
        for hook in hooks:
            hook.remove()
    return [_Seen(out, added, routed) for (out, routed), added in zip(calls, sums.found, strict=True)]


def _noted(out: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Any, Routed | None]:
    """What a mixture gave and was called with, in tensors that nothing changes later."""
    routed = routed_of(args, keywords)
    own = None if routed is None else Routed(routed.hidden.clone(), routed.chosen.clone(), routed.weights.clone())
    return (out.clone() if isinstance(out, Tensor) else None), own


def _known(pair: Pair, gone: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether both mixtures are called once and add what they give to something, and give what their experts' layers say.

    By the first batch.
    """
    if not pair.batches:
        return True
    for layers, run, without in zip((pair.one, pair.other), pair.batches[0], gone, strict=True):
        seen = _seen(layers, run, without)
        if len(seen) > 1:
            return False
        for call in seen:
            if call.added is None or call.routed is None or call.routed.hidden.dim() != 2:
                return False
            module, out = layers[0], call.out.double()
            made = torch.zeros_like(out)
            for expert, tokens, x in call.parts(module):
                made.index_add_(0, tokens, x @ module.down_proj[expert].double().T)  # type: ignore[index]
            if bool(out.isfinite().all()) and not torch.allclose(made, out, rtol=0, atol=CLOSE * float(out.abs().max())):
                return False
    return True
