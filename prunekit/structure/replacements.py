"""Modules that take the place of others once something is removed, where smaller tensors are not enough."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.structure.groups import SKIPS, is_skip


class Skip(nn.Module):
    """Stands for a removed residual block: gives back its first input, whatever else it is called with.

    Args:
        length: of the tuple that the block gave, its input first; 0 for the input itself.
        others: what stands behind it in the tuple: the number and name of an argument of the block, or None.
    """

    self_attn: SimpleNamespace

    def __init__(self, length: int = 0, others: Sequence[tuple[int, str] | None] = ()) -> None:
        super().__init__()
        self.length, self.others = length, tuple(others)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        if not self.length:
            return x
        behind = [None if other is None else argument(args, kwargs, *other) for other in self.others]
        return (x, *behind, *[None] * (self.length - 1 - len(behind)))

    @classmethod
    def of(cls, module: nn.Module, kind: str) -> Skip:
        """What stands for a block, as its kind of ``SKIPS`` says.

        Raises:
            ValueError: the block has no argument of that number.
        """
        length, numbers = SKIPS.fullmatch(kind).groups()  # type: ignore[union-attr]
        names = arguments(module)
        others: list[tuple[int, str] | None] = []
        for number in (numbers or "").split("@")[1:]:
            if number != "-" and int(number) >= len(names):
                raise ValueError(f"a {type(module).__name__} has no argument number {number}")
            others.append(None if number == "-" else (int(number), names[int(number)]))
        return cls(int(length or 0), others)


def first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """What a block is given first, by place or by name; None when it is given no tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def arguments(module: nn.Module) -> list[str]:
    """Names of what the module's forward takes, by place."""
    return list(inspect.signature(module.forward).parameters)


def argument(args: Any, kwargs: Any, number: int, name: str) -> Any:
    """One argument of a call, given by place or by name; None where it was left out."""
    return args[number] if number < len(args) else kwargs.get(name)


class NarrowAttention(nn.Module):
    """``nn.MultiheadAttention`` whose heads together may be narrower than its embedding.

    torch's own demands ``embed_dim == heads × head size``, which no longer holds when heads are gone. Same call, same
    names in the state dict; tensors of ``dense`` are taken over, to be cut afterwards.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None

    def __init__(self, dense: nn.MultiheadAttention | NarrowAttention) -> None:
        super().__init__()
        self.embed_dim: int = dense.embed_dim
        self.num_heads: int = dense.num_heads
        self.head_dim: int = dense.head_dim
        self.dropout: float = dense.dropout
        self.batch_first: bool = dense.batch_first
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(dense, name))
        self.out_proj: nn.Module = dense.out_proj
        # nn.TransformerEncoderLayer then stays off its fused path, which takes the head size to be embed_dim / heads.
        self._qkv_same_embed_dim = False
        self.train(dense.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; an ``attn_mask`` is ``(targets, sources)``, the same for every head."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if attn_mask is not None and attn_mask.dim() != 2:
            raise RuntimeError(f"attn_mask of {attn_mask.dim()} axes: a pruned attention takes one mask (targets, sources)")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), self._weights(), self._biases(), strict=True)
        )
        logits = q @ k.mT / self.head_dim**0.5
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
            if mask is not None:
                logits = logits.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        weights = F.dropout(logits.softmax(-1), self.dropout, self.training)
        out: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            return out[0], None if shown is None else shown[0]
        return (out if self.batch_first else out.transpose(0, 1)), shown

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(weight for weight in separate if weight is not None)

    def _biases(self) -> tuple[Tensor | None, ...]:
        return (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)


def _narrow(module: nn.Module) -> nn.Module:
    if not isinstance(module, (nn.MultiheadAttention, NarrowAttention)):
        raise ValueError(f"a {type(module).__name__} cannot become a narrower attention")
    return NarrowAttention(module)


def _skip(module: nn.Module, kind: str) -> nn.Module:
    skip = Skip.of(module, kind).train(module.training)
    if isinstance(module, nn.TransformerEncoderLayer):  # torch's encoder asks its first layer for this
        skip.self_attn = SimpleNamespace(batch_first=module.self_attn.batch_first)
    return skip


ATTENTION = "attention"
"""Kind of replacement that is a ``NarrowAttention``."""


def known(kind: str) -> bool:
    """Whether there is such a kind of replacement; the kind is all that a file says of it."""
    return kind == ATTENTION or is_skip(kind)


def replacement(module: nn.Module, kind: str) -> nn.Module:
    """What takes a module's place.

    Raises:
        ValueError: the module cannot be replaced so.
    """
    return _skip(module, kind) if is_skip(kind) else _narrow(module)
