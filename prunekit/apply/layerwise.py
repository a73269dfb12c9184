"""Kept weights that keep each layer's outputs: exact least squares on the layers' own inputs, one layer after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply.masks import apply_masks
from prunekit.batch import call, to
from prunekit.blocks import ACTIVATIONS, Abreast, Pair
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
from prunekit.progress import Bar
from prunekit.task import Task, get_task
from prunekit.task.evaluation import mixing
from prunekit.trajectory.copies import copied

INPUTS = ("dense", "pruned")
Moments = tuple[list[str], Tensor, Tensor]
"""Names of layers with the same inputs, and of these ``Σ x̃ x̃ᵀ`` and ``Σ x̃ xᵀ``, ``(groups, d + 1, d + 1)``, a constant 1 among
them."""


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
            ones' errors too. In a model of blocks each block runs some ten times, as often as it has layers with inputs of their
            own, in the dense and in the pruned model; layers outside of blocks, or of a model without, take two passes through
            all of it each. ``dense``: ``x̃ = x``, one forward pass in all.
        task: says what of a batch is the model's input.
        damping: adds ``damping × mean diagonal of H × |v - w|²``. With 0 the layer's error on ``batches`` is the least that
            the mask allows; a little helps where samples are few.

    Raises:
        ArtifactError: a mask names no parameter or buffer of the model, or has another shape.
        NonFiniteError: what reaches a layer is NaN or Inf.
        UsageError: ``inputs`` or ``damping`` is out of range, or there is no sample.
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
    found = _of_dense(dense, layers, masks, samples, whole)
    if inputs == "pruned":
        found = _of_both((dense, pruned), (layers, theirs), samples, whole)
    with Bar("layers", len(layers)) as bar:
        for names, gram, cross in found:
            if not bool(gram.isfinite().all() and cross.isfinite().all()):
                raise NonFiniteError(f"{names[0]}: its layer's inputs are NaN or Inf for some of the samples; look at the data")
            for name in names:
                bias_name = f"{name.removesuffix('weight')}bias"
                layer, keep, bias_keep = layers[name][0], masks[name].to(device).bool(), masks.get(bias_name)
                bias_keep = None if bias_keep is None else bias_keep.to(device).bool()
                weight, offset = _solve(layer, gram, cross, keep, bias_keep, damping)
                for parameters in (final, following):
                    parameters[name].copy_(weight)
                    if _trains_bias(layer):
                        parameters[bias_name].copy_(offset)
                bar.advance()
    return result


def _with_one(inputs: Tensor) -> Tensor:
    """A last input that is always 1: the bias's."""
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)


def _of_dense(
    dense: nn.Module, layers: Mapping[str, list[Layer]], masks: Mapping[str, Tensor], samples: Samples, whole: bool
) -> Iterator[Moments]:
    """With the dense model's inputs for both."""
    device = next(dense.parameters()).device
    for some in portions({name: held for name, held in layers.items() if not bool(masks[name].all())}, 2):
        with sharing(samples, whole) as (own, _):
            with summing(some, lambda piece: of_products(_with_one(piece))) as grams:
                for x, _ in own:
                    call(dense, to(x, device))
            add_up(grams, device)
        for name in list(grams):
            gram = grams.pop(name)
            yield [name], gram, gram


def _of_both(
    models: tuple[nn.Module, nn.Module],
    layers: tuple[Mapping[str, list[Layer]], Mapping[str, list[Layer]]],
    samples: Samples,
    whole: bool,
) -> Iterator[Moments]:
    """With what reaches a layer in the pruned model for ``x̃``; a layer that is changed before the next is asked for is seen so.

    Layers with the same inputs have the same sums, and come together.
    """
    if not len(samples):
        raise UsageError("layerwise needs calibration samples; it got none")
    shared = partial(sharing, samples, whole)
    with shared() as (own, _):
        both = Abreast(models, layers, own, samples.rows(0, 1)[0], ACTIVATIONS, Path(tempfile.gettempdir()))
        pairs = both.pairs()
    while True:
        with shared():
            pair = next(pairs, None)
            if pair is None:
                return
            gram, cross = _sums(pair)
        yield pair.names, gram, cross


def _sums(pair: Pair) -> tuple[Tensor, Tensor]:
    """``Σ x̃ x̃ᵀ`` and ``Σ x̃ xᵀ``; the dense model's inputs of one batch are held.

    Where the two models send a layer other rows, as a router may, none of which belong together, ``x`` is ``x̃``.
    """
    weight = pair.one[0].weight
    assert isinstance(weight, Tensor)
    groups, _, size = to_rows(pair.one[0], weight).shape
    gram = torch.zeros(groups, size + 1, size + 1, dtype=torch.float64, device=weight.device)
    cross, alike = torch.zeros_like(gram), True
    for one, other in pair.batches:
        ours, theirs = (_seen(held, run) for held, run in ((pair.one, one), (pair.other, other)))
        alike = alike and [x.shape for _, x in ours] == [x.shape for _, x in theirs]
        for number, (layer, x) in enumerate(theirs):
            before = rows(*ours[number]) if alike else repeat(None)
            for turned, given in zip(rows(layer, x), before, strict=alike):
                turned = _with_one(turned)
                gram.baddbmm_(turned.transpose(1, 2), turned)
                if given is not None:
                    cross.baddbmm_(turned.transpose(1, 2), _with_one(given))
    ranks.add_up([gram, cross])
    return gram, cross if all(ranks.gathered(alike)) else gram.clone()


def _seen(layers: Sequence[Layer], run: Callable[[], Any]) -> list[tuple[Layer, Tensor]]:
    """Every input that reaches one of the layers."""
    seen: list[tuple[Layer, Tensor]] = []
    with reaching({"": layers}, lambda name, layer, x: seen.append((layer, x))):
        run()
    return seen


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
