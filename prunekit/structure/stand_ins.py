"""What stands in, in a masked model, for units whose removal no zeros say: experts, and blocks that normalise their output.

A router that has lost an expert chooses among the others; zeros in its row would leave the expert a share of every token. A block
that ends in a normalisation gives 0 without its weights, where without the block its input goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.structure.groups import ROUTER, is_skip
from prunekit.structure.replacements import Skip

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "out_features")
"""What routers and experts call the number of experts."""
Wanted = Mapping[str, tuple[str, Tensor]]
"""Module -> kind of what stands in for it, and which units of its group stay, ``(units,)``."""


def known_stand_in(kind: Any) -> bool:
    """Whether there is such a kind; the kind is all that a file says of it."""
    return kind == ROUTER or is_skip(kind)


class StandIn:
    """A forward hook that gives another answer than the module did; nothing of the module changes.

    Attributes:
        kind: ``ROUTER`` or one of ``SKIPS``.
        keep: which units stay, ``(units,)``.
    """

    def __init__(self, kind: str, keep: Tensor) -> None:
        self.kind, self.keep = kind, keep

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.kind == ROUTER:
            return routed(module, args, kwargs, output, self.keep)
        return Skip.of(module, self.kind)(*args, **kwargs)


def stand_in(model: nn.Module, wanted: Wanted) -> None:
    """Puts stand-ins into a masked model; those that it had, from before it was copied or pruned further, are gone."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, StandIn)]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
    for name, (kind, keep) in wanted.items():
        model.get_submodule(name).register_forward_hook(StandIn(kind, keep), with_kwargs=True)


def routed(router: nn.Module, args: Any, kwargs: Any, output: Any, keep: Tensor) -> Any:
    """What the router answers where it chooses among the experts that stay, whose numbers are those of the dense model.

    Scores of those that are gone are the lowest number there is.
    """
    rows = keep.nonzero().flatten()
    small = copy.copy(router)
    for table in ("_parameters", "_buffers"):
        own = {
            name: tensor[rows.to(tensor.device)] if tensor is not None and tensor.dim() and len(tensor) == len(keep) else tensor
            for name, tensor in vars(router)[table].items()
        }
        vars(small)[table] = own
    for name in COUNTS:
        if vars(router).get(name) == len(keep):
            vars(small)[name] = len(rows)
    return _numbered(small.forward(*args, **kwargs), output, rows, len(keep))


def _numbered(found: Any, dense: Any, rows: Tensor, experts: int) -> Any:
    if isinstance(found, tuple | list):
        return type(found)(_numbered(one, other, rows, experts) for one, other in zip(found, dense, strict=True))
    if not isinstance(found, Tensor):
        return found
    rows = rows.to(found.device)
    if not found.is_floating_point():
        return rows[found]
    if not found.dim() or dense.shape[-1] != experts or found.shape[-1] != len(rows):
        return found
    full = found.new_full(dense.shape, torch.finfo(found.dtype).min)
    full[..., rows] = found
    return full
