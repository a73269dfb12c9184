"""Kept weights that keep each layer's outputs: exact least squares on the layers' own inputs, one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply.masks import apply_masks
from prunekit.batch import call, to
from prunekit.criteria.by_inputs import portions
from prunekit.criteria.layer_inputs import (
    Layer,
    add_up,
    from_rows,
    handled,
    layers_with_inputs,
    of_products,
    reaching,
    rows,
    summing,
    to_rows,
)
from prunekit.data import Samples
from prunekit.data.sharing import sharing
from prunekit.errors import NonFiniteError, UsageError, nearest
from prunekit.task import Task, get_task
from prunekit.task.evaluation import mixing
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

    For every output of a linear layer or a convolution: ``min_v Σ (w·x - v·x̃)²`` over ``v`` that is 0 where the mask removes,
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
    kind = get_task(task)
    samples = Samples.of(batches, kind.batch)
    whole = mixing(dense, samples, kind)
    modules = dict(dense.named_modules())
    named = [n for n in masks if n.endswith(".weight") or n == "weight"]
    named = [n for n in named if handled(modules.get(n.rpartition(".")[0]))]
    layers, theirs = layers_with_inputs(dense, named)[0], layers_with_inputs(pruned, named)[0]
    final, following = dict(result.named_parameters()), dict(pruned.named_parameters())
    for name, gram, cross in _moments(dense, pruned, layers, theirs, masks, samples, whole, inputs):
        if not bool(gram.isfinite().all() and cross.isfinite().all()):
            raise NonFiniteError(f"{name}: its layer's inputs are NaN or Inf for some of the samples; look at the data")
        bias_name = f"{name.removesuffix('weight')}bias"
        layer = layers[name][0]
        keep = masks[name].to(device).bool()
        bias_keep = masks.get(bias_name)
        weight, offset = _solve(layer, gram, cross, keep, None if bias_keep is None else bias_keep.to(device).bool(), damping)
        for parameters in (final, following):
            parameters[name].copy_(weight)
            if _trains_bias(layer):
                parameters[bias_name].copy_(offset)
    return result


def _with_one(inputs: Tensor) -> Tensor:
    """A last input that is always 1: the bias's."""
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)


def _moments(
    dense: nn.Module,
    pruned: nn.Module,
    layers: Mapping[str, list[Layer]],
    theirs: Mapping[str, list[Layer]],
    masks: Mapping[str, Tensor],
    samples: Samples,
    whole: bool,
    inputs: str,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each layer ``Σ x̃ x̃ᵀ`` and ``Σ x̃ xᵀ``, ``(groups, d + 1, d + 1)``, a constant 1 among the inputs.

    Where ``x̃`` is what reaches a layer in ``pruned``, layers come in the order of the forward pass, and one that is changed
    before the next is asked for is what that sees.
    """
    if inputs == "dense":
        for some in portions({name: held for name, held in layers.items() if not bool(masks[name].all())}, 2):
            with sharing(samples, whole) as (own, _):
                with summing(some, lambda piece: of_products(_with_one(piece))) as grams:
                    _run(dense, own)
                add_up(grams, next(dense.parameters()).device)
            for name in list(grams):
                gram = grams.pop(name)
                yield name, gram, gram
        return
    for name in _order(dense, layers, samples):
        with sharing(samples, whole) as (own, _):
            found = _pair(dense, pruned, layers[name], theirs[name], own)
            ranks.add_up(found)
        yield name, *found


def _run(model: nn.Module, samples: Samples) -> None:
    device = next(model.parameters()).device
    for x, _ in samples:
        call(model, to(x, device))


def _order(model: nn.Module, layers: Mapping[str, list[Layer]], samples: Samples) -> list[str]:
    """The layers that are reached, in that order."""
    found: dict[str, None] = {}
    with reaching(layers, lambda name, layer, x: found.setdefault(name)):
        _run(model, samples)
    return list(found)


def _pair(dense: nn.Module, pruned: nn.Module, mine: list[Layer], other: list[Layer], samples: Samples) -> tuple[Tensor, Tensor]:
    """``Σ x̃ x̃ᵀ`` and ``Σ x̃ xᵀ`` of one layer; the dense model's inputs of one batch are held."""
    seen: list[Tensor] = []
    weight = mine[0].weight
    assert isinstance(weight, Tensor)
    groups, _, size = to_rows(mine[0], weight).shape
    gram = torch.zeros(groups, size + 1, size + 1, dtype=torch.float64, device=weight.device)
    cross = torch.zeros_like(gram)

    def add(_: str, layer: Layer, x: Tensor) -> None:
        for theirs, ours in zip(rows(layer, x), rows(layer, seen.pop(0)), strict=True):
            turned = _with_one(theirs)
            gram.baddbmm_(turned.transpose(1, 2), turned)
            cross.baddbmm_(turned.transpose(1, 2), _with_one(ours))

    with reaching({"": mine}, lambda name, layer, x: seen.append(x)), reaching({"": other}, add):
        for x, _ in samples:
            x = to(x, weight.device)
            call(dense, x)
            call(pruned, x)
    return gram, cross


def _solve(
    layer: Any, gram: Tensor, cross: Tensor, keep: Tensor, bias_keep: Tensor | None, damping: float
) -> tuple[Tensor, Tensor]:
    """The compensated weight, of its shape, and biases ``(outputs,)``, float64."""
    size = gram.shape[1] - 1
    weight, kept = (to_rows(layer, tensor).reshape(-1, size) for tensor in (layer.weight, keep))
    bias = layer.bias
    if bias is None or not _trains_bias(layer):  # then both sides of the error have the same, which drops out
        bias, bias_keep = weight.new_zeros(len(kept)), torch.zeros_like(kept[:, 0])
    elif bias_keep is None:
        bias_keep = torch.ones_like(kept[:, 0])
    assert bias_keep is not None
    joint = torch.cat([weight, bias[:, None]], 1).double()
    keeps = torch.cat([kept, bias_keep[:, None]], 1)
    solved = joint * keeps
    each = len(joint) // len(gram)
    for group in range(len(gram)):
        mine = slice(group * each, (group + 1) * each)
        level = damping * gram[group].diagonal()[:-1].mean()
        damped = gram[group] + level * torch.eye(size + 1, dtype=gram.dtype, device=gram.device)
        patterns, which = torch.unique(keeps[mine], dim=0, return_inverse=True)
        for number, stays in enumerate(patterns):
            if bool(stays.any()):
                those = torch.arange(len(joint), device=joint.device)[mine][which == number]
                old = joint[those]
                lacking = old @ cross[group].T[:, stays] - old[:, stays] @ gram[group][stays][:, stays]
                change = _divide(damped[stays][:, stays], lacking.T).T
                solved[those] = torch.zeros_like(old).masked_scatter(stays.expand_as(old), old[:, stays] + change)
    return from_rows(layer, solved[:, :-1].reshape(len(gram), each, size)), solved[:, -1]


def _trains_bias(layer: Any) -> bool:
    return layer.bias is not None and bool(layer.bias.requires_grad)


def _divide(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a symmetric matrix without negative eigenvalues; the smallest solution where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) == 0 and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right
