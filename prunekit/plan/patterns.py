"""Weights in patterns that hardware can use: N of every M consecutive ones stay, or whole tiles go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from prunekit.plan.allocation import Sharing
from prunekit.structure import Pattern


def outputs_first(weights: Mapping[str, Tensor], axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Views whose first axis is the outputs'.

    Args:
        axes: of weights whose outputs are on another axis than the first, that axis.
    """
    return {name: values.movedim(axes[name], 0) if name in axes else values for name, values in weights.items()}


def as_stored(weights: Mapping[str, Tensor], axes: Mapping[str, int]) -> dict[str, Tensor]:
    """The way back from ``outputs_first``."""
    return {name: values.movedim(0, axes[name]).contiguous() if name in axes else values for name, values in weights.items()}


def nm_mask(importance: Tensor, stay: int, of: int) -> Tensor:
    """Mask of the N:M pattern (Mishra et al. 2021): of every M consecutive weights of an output, the N largest stay.

    An output's weights are its row: of a convolution, input channels × kernel, as they lie in memory. The last run of a
    row that M does not divide keeps the same share of its t weights, rounded up: ``ceil(t N / M)``. Ties are broken by
    position.

    Args:
        importance: ``(outputs, ...)``.
    """
    rows = importance.flatten(1)
    width = rows.shape[1]
    full = width - width % of
    keep = torch.empty(rows.shape, dtype=torch.bool, device=importance.device)
    for part, size, count in (
        (slice(0, full), of, stay),
        (slice(full, width), width - full, math.ceil((width - full) * stay / of)),
    ):
        if rows[:, part].numel():
            runs = rows[:, part].reshape(-1, size)
            ranking = torch.sort(runs, dim=1, descending=True, stable=True).indices
            chosen = torch.zeros(runs.shape, dtype=torch.bool, device=runs.device).scatter_(1, ranking[:, :count], True)
            keep[:, part] = chosen.view(len(rows), -1)
    return keep.view(importance.shape)


def tile_importance(importance: Tensor, rows: int, columns: int, group: Literal["sum", "l2", "draw"] = "sum") -> Tensor:
    """Importance of every tile of ``rows × columns`` weights, ``(tiles down, tiles across)``.

    Args:
        importance: of weights, ``(outputs, ...)``; what follows the first axis is one row. Tiles at the edges may be
            smaller.
        group: ``sum`` of the weights' importances (additive criteria: their signed scores were reduced to axes, so what
            cancels inside a tile is not known), ``l2`` norm, or the first weight's ``draw``.
    """
    flat = importance.flatten(1).double()
    if group == "draw":
        return flat[::rows, ::columns]
    powers = flat.square() if group == "l2" else flat
    down, across = -(-flat.shape[0] // rows), -(-flat.shape[1] // columns)
    padded = powers.new_zeros(down * rows, across * columns)
    padded[: flat.shape[0], : flat.shape[1]] = powers
    sums = padded.view(down, rows, across, columns).sum((1, 3))
    return sums.sqrt() if group == "l2" else sums


def block_masks(
    importance: dict[str, Tensor],
    pattern: Pattern,
    sparsity: float,
    allocation: Sharing,
    group: Literal["sum", "l2", "draw"] = "sum",
) -> dict[str, Tensor]:
    """Masks of which every tile is kept or gone as a whole; tiles go least important first, to the nearest share.

    Args:
        importance: by parameter name, ``(outputs, ...)``.
        group: how weights make up a tile, see ``tile_importance``.
    """
    rows, columns = pattern.first, pattern.second
    comparable = allocation({name: tile_importance(value, rows, columns, group) for name, value in importance.items()})
    sizes = {name: tile_importance(torch.ones_like(value), rows, columns).long().flatten() for name, value in importance.items()}
    flat = torch.cat([comparable[name].flatten().double() for name in importance])
    counts = torch.cat([sizes[name] for name in importance])
    order = torch.sort(flat, stable=True).indices
    removed = torch.cat([counts.new_zeros(1), counts[order].cumsum(0)])
    wanted = sparsity * int(counts.sum())
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[order[: int((removed - wanted).abs().argmin())]] = False
    parts = keep.split([len(sizes[name]) for name in importance])
    return {name: expand(part, importance[name], pattern) for name, part in zip(importance, parts, strict=True)}


def expand(tiles: Tensor, like: Tensor, pattern: Pattern) -> Tensor:
    """Tiles ``(tiles,)`` to a mask of the shape of ``like``."""
    height, width = like.flatten(1).shape
    across = -(-width // pattern.second)
    mask = tiles.view(-1, across).repeat_interleave(pattern.first, 0).repeat_interleave(pattern.second, 1)
    return mask[:height, :width].reshape(like.shape)


def pattern_fault(mask: Tensor, pattern: Pattern) -> str | None:
    """How ``mask`` breaks the pattern; None when it holds (an N:M run may keep fewer than N)."""
    if pattern.kind == "nm":
        allowed = nm_mask(mask.float(), pattern.first, pattern.second)
        if bool((mask & ~allowed).any()):
            return f"keeps more than {pattern.first} of {pattern.second} consecutive weights somewhere"
    else:
        share = tile_importance(mask, pattern.first, pattern.second)
        full = tile_importance(torch.ones_like(mask), pattern.first, pattern.second)
        if bool(((share != 0) & (share != full)).any()):
            return f"keeps a part of a block of {pattern.first}x{pattern.second}"
    return None
