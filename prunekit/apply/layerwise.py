"""Kept weights that keep each layer's outputs: exact least squares on the layers' own inputs, one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.apply.masks import apply_masks
from prunekit.batch import call, to
from prunekit.criteria.layer_inputs import LAYERS, Layer, layers_of, watching
from prunekit.data import Samples
from prunekit.errors import NonFiniteError, UsageError, nearest
from prunekit.task import Task, get_task
from prunekit.trajectory.copies import copied

INPUTS = ("dense", "pruned")


@torch.no_grad()
def layerwise(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    batches: Any,
    *,
    inputs: str = "pruned",
    damping: float = 0.01,
    task: str | Task | None = None,
) -> nn.Module:
    """A masked copy of ``model`` whose kept weights minimise each layer's squared output error on ``batches``.

    For every output of a Linear, Conv1d or Conv2d layer: ``min_v Σ (w·x - v·x̃)²`` over ``v`` that is 0 where the mask removes,
    ``w`` the dense weights and ``x`` the dense model's inputs, a constant 1 for the bias among them. With ``x̃ = x`` this is
    ``v_K = w_K + H_KK⁻¹ H_KR w_R``, ``H = Σ x xᵀ``, ``K`` what stays and ``R`` what goes: Optimal Brain Surgeon for a whole set
    at once, the problem that SparseGPT (arXiv 2301.00774) solves approximately. Where there are several minima, the one
    nearest to ``w`` is taken. Masked parameters of other layers are masked only, and a frozen bias stays as it is.

    One factorisation of a ``|K| × |K|`` matrix an output, or one a layer where all outputs keep the same (channels).

    Args:
        model: the weights that ``masks`` were made for; left as it is.
        masks: by parameter or buffer name, True stays: ``Plan.masks()``.
        batches: calibration samples as ``(inputs, labels)``; labels are not looked at.
        inputs: ``pruned``: ``x̃`` is what the compensated layers before it send, so that later layers make up for earlier
            ones' errors too; two forward passes a layer. ``dense``: ``x̃ = x``, one forward pass in all.
        task: says what of a batch is the model's input.
        damping: adds ``damping × mean diagonal of H × |v - w|²``. With 0 the layer's error on ``batches`` is the least that
            the mask allows; a little helps where samples are few.

    Raises:
        ArtifactError: a mask names no parameter or buffer of the model, or has another shape.
        NonFiniteError: what reaches a layer is NaN or Inf.
        UsageError: ``inputs`` or ``damping`` is out of range.
    """
    if damping < 0:
        raise UsageError(f"damping is {damping}; it must be at least 0")
    if inputs not in INPUTS:
        raise UsageError(f"inputs {inputs!r} does not exist; {nearest(inputs, list(INPUTS))}")
    result = copied(model)
    apply_masks(result, masks)
    dense, pruned = copied(model).eval(), copied(result).eval()
    device = next(dense.parameters()).device
    samples = Samples.of(batches, get_task(task).batch)
    modules = dict(dense.named_modules())
    named = [n for n in masks if n.endswith("weight") and isinstance(modules.get(n.rpartition(".")[0]), LAYERS)]
    layers, theirs = layers_of(dense, named, "compensation"), layers_of(pruned, named, "compensation")
    grams = _grams(dense, layers, samples)
    final, following = dict(result.named_parameters()), dict(pruned.named_parameters())
    for name, gram in grams.items():  # in the order of the forward pass
        if bool(masks[name].all()) and inputs == "dense":
            continue
        cross = gram
        if inputs == "pruned":
            gram, cross = _pair(dense, pruned, name, layers[name], theirs[name], samples)
        if not bool(gram.isfinite().all() and cross.isfinite().all()):
            raise NonFiniteError(f"{name}: its layer's inputs are NaN or Inf for some of the samples; look at the data")
        bias_name = f"{name.removesuffix('weight')}bias"
        layer = layers[name]
        keep = masks[name].to(device).bool()
        bias_keep = masks.get(bias_name, torch.ones(len(keep), dtype=torch.bool)).to(device).bool()
        weight, offset = _solve(layer, gram, cross, keep, bias_keep, damping)
        for parameters in (final, following):
            parameters[name].copy_(weight.view(keep.shape))
            if _trains_bias(layer):
                parameters[bias_name].copy_(offset)
    return result


def _with_one(inputs: Tensor) -> Tensor:
    """A last input that is always 1: the bias's."""
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)


def _grams(model: nn.Module, layers: Mapping[str, Layer], samples: Samples) -> dict[str, Tensor]:
    """``Σ x xᵀ``, ``(groups, d + 1, d + 1)``, in the order in which the layers are reached."""
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device

    def add(name: str, inputs: Tensor) -> None:
        x = _with_one(inputs)
        gram = x.transpose(1, 2) @ x
        found[name] = found[name] + gram if name in found else gram

    with watching(layers, add):
        for x, _ in samples:
            call(model, to(x, device))
    return found


def _pair(dense: nn.Module, pruned: nn.Module, name: str, mine: Layer, other: Layer, samples: Samples) -> tuple[Tensor, Tensor]:
    """``Σ x̃ x̃ᵀ`` and ``Σ x̃ xᵀ`` of one layer; ``x̃`` is what reaches it in ``pruned``."""
    seen: list[Tensor] = []
    size = mine.weight[0].numel() + 1
    gram = torch.zeros(getattr(mine, "groups", 1), size, size, dtype=torch.float64, device=mine.weight.device)
    cross = torch.zeros_like(gram)

    def add(_: str, inputs: Tensor) -> None:
        x = _with_one(inputs)
        gram.baddbmm_(x.transpose(1, 2), x)
        cross.baddbmm_(x.transpose(1, 2), seen.pop(0))

    with watching({name: mine}, lambda _, inputs: seen.append(_with_one(inputs))), watching({name: other}, add):
        for x, _ in samples:
            x = to(x, mine.weight.device)
            call(dense, x)
            call(pruned, x)
    return gram, cross


def _solve(layer: Layer, gram: Tensor, cross: Tensor, keep: Tensor, bias_keep: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Compensated weight rows ``(outputs, d)`` and biases ``(outputs,)``, float64."""
    size = gram.shape[1] - 1
    bias = layer.bias
    if bias is None or not _trains_bias(layer):  # then both sides of the error have the same, which drops out
        bias, bias_keep = layer.weight.new_zeros(len(keep)), torch.zeros_like(bias_keep)
    rows = torch.cat([layer.weight.reshape(-1, size), bias[:, None]], 1).double()
    keeps = torch.cat([keep.reshape(-1, size), bias_keep[:, None]], 1)
    solved = rows * keeps
    each = len(rows) // len(gram)
    for group in range(len(gram)):
        mine = slice(group * each, (group + 1) * each)
        level = damping * gram[group].diagonal()[:-1].mean()
        damped = gram[group] + level * torch.eye(size + 1, dtype=gram.dtype, device=gram.device)
        patterns, which = torch.unique(keeps[mine], dim=0, return_inverse=True)
        for number, kept in enumerate(patterns):
            if bool(kept.any()):
                those = torch.arange(len(rows), device=rows.device)[mine][which == number]
                old = rows[those]
                lacking = old @ cross[group].T[:, kept] - old[:, kept] @ gram[group][kept][:, kept]
                change = _divide(damped[kept][:, kept], lacking.T).T
                solved[those] = torch.zeros_like(old).masked_scatter(kept.expand_as(old), old[:, kept] + change)
    return solved[:, :-1], solved[:, -1]


def _trains_bias(layer: Layer) -> bool:
    return layer.bias is not None and layer.bias.requires_grad


def _divide(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a symmetric matrix without negative eigenvalues; the smallest solution where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) == 0 and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right
