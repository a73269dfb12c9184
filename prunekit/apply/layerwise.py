"""Kept weights that keep each layer's outputs: exact least squares on the layers' own inputs, one layer after the other."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply.masks import apply_masks, what_goes
from prunekit.apply.mixtures import LAST, mend, mixture
from prunekit.apply.sums import following
from prunekit.batch import call, fresh, to
from prunekit.blocks import ACTIVATIONS, Abreast, Pair
from prunekit.criteria.by_inputs import portions
from prunekit.criteria.layer_inputs import (
    Layer,
    add_up,
    from_rows,
    handled,
    layers_with_inputs,
    not_finite,
    of_products,
    output_rows,
    reaching,
    rows,
    summing,
    to_rows,
    unlike_their_weights,
)
from prunekit.data import Samples
from prunekit.data.sharing import sharing
from prunekit.errors import UsageError, nearest
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.structure.stand_ins import stand_in
from prunekit.task import Task, get_task
from prunekit.task.evaluation import mixing
from prunekit.trajectory.copies import copied

INPUTS = ("dense", "pruned")
FEW = 4
"""Samples by which layers are told from others that compute something else."""


@dataclass(frozen=True)
class Moments:
    """Sums over what reaches layers with the same inputs, a constant 1 among these.

    Attributes:
        names: of the layers.
        gram, cross: ``Σ x̃ x̃ᵀ`` and ``Σ x̃ xᵀ``, ``(groups, d + 1, d + 1)``.
        lacking: ``Σ (r - r̃) x̃ᵀ``, ``(groups, outputs / groups, d + 1)``, of what the outputs are added to; None where that is
            nothing that is known.
    """

    names: list[str]
    gram: Tensor
    cross: Tensor
    lacking: Tensor | None = None


@torch.no_grad()
def layerwise(
    model: nn.Module,
    plan: Plan | Mapping[str, Tensor],
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
    nearest to ``w`` is taken. Masked parameters of other layers, those that others hold too (an embedding tied to the output
    layer), those of layers that give something else than weight times inputs and bias, and what is frozen where something
    trains, are masked only; a bias that is frozen, or that layers share, stays as it is, and so do those of a shared weight.

    Where the layer's outputs are added to something before anything else reads them (``prunekit.apply.sums``), and the layer is
    called once in a run and has no other beside it with the same inputs, it is the sum
    that is kept: ``min_v Σ (w·x + r - v·x̃ - r̃)²``, ``r`` what is added. What layers that are gone altogether added to the same
    sum later belongs to ``r``: the last to write into a residual stream before blocks that are gone does what they did.
    So do the experts of a mixture, by their last layers (``prunekit.apply.mixtures``). With ``inputs="dense"`` no sum is kept.

    One factorisation of a ``|K| × |K|`` matrix an output, or one a layer where all outputs keep the same (channels).

    Args:
        model: the weights that ``plan`` was made for; left as it is.
        plan: a plan, or masks by parameter or buffer name (True stays). Of a plan, prunable weights that lose nothing may
            change too, and the copy has its stand-ins (``Plan.stand_ins``).
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
    masks, stand_ins = what_goes(model, plan)
    apply_masks(result, masks)
    stand_in(result, stand_ins)
    dense, pruned = copied(model).eval(), copied(result).eval()
    device = next(dense.parameters()).device
    kind = get_task(task)
    samples = Samples.of(batches, kind.batch)
    whole = mixing(dense, samples, kind)
    modules = dict(dense.named_modules())
    otherwise = _read_otherwise(dense) | _frozen(dense)
    named = [n for n in masks if (n.endswith(".weight") or n == "weight") and n not in otherwise]
    named = [n for n in named if handled(modules.get(owner_of(n)))]
    unlike = _unlike(dense, layers_with_inputs(dense, named)[0], samples, whole)
    named = [n for n in named if n not in unlike]
    layers, theirs = layers_with_inputs(dense, named)[0], layers_with_inputs(pruned, named)[0]
    banks = [name for name in masks if inputs == "pruned" and name.endswith(LAST) and mixture(modules.get(owner_of(name)))]
    for every, holding in ((layers, modules), (theirs, dict(pruned.named_modules()))):
        every.update({name: [holding[owner_of(name)]] for name in banks})
    holders = Counter(id(each) for module in dense.modules() for each in module._parameters.values())
    biases = {name: None if name in banks else _bias_kept(holders, name, layers[name], masks) for name in layers}
    gone = [name for name in layers if not bool(masks[name].any()) and not _stays(biases[name])]
    final, running = dict(result.named_parameters()), dict(pruned.named_parameters())
    found: Iterator[Moments | str]
    if inputs == "pruned":
        found = _of_both((dense, pruned), (layers, theirs), banks, gone, masks, damping, samples, whole)
    else:
        found = _of_dense(dense, layers, masks, samples, whole)
    with Bar("layers", len(layers) - len(gone)) as bar:
        for sums in found:
            if isinstance(sums, str):  # a mixture's, which is changed already
                final[sums].copy_(running[sums])
                bar.advance()
                continue
            if not all(bool(each.isfinite().all()) for each in (sums.gram, sums.cross, sums.lacking) if each is not None):
                raise not_finite(sums.names[0])
            for name in sums.names:
                keep, bias_keep = masks[name].to(device).bool(), biases[name]
                weight, offset = _solve(layers[name][0], sums, keep, bias_keep, damping)
                for parameters in (final, running):
                    parameters[name].copy_(weight)
                    if bias_keep is not None:
                        parameters[_bias_of(name)].copy_(offset)
                bar.advance()
    return result


def owner_of(parameter: str) -> str:
    """The name of the module that holds it."""
    return parameter.rpartition(".")[0]


def _read_otherwise(model: nn.Module) -> set[str]:
    """All names of parameters that something holds which is no such layer, as an embedding does an output layer's weight."""
    modules, names = dict(model.named_modules(remove_duplicate=False)), dict(model.named_parameters(remove_duplicate=False))
    read = {id(tensor) for name, tensor in names.items() if not handled(modules[owner_of(name)])}
    return {name for name, tensor in names.items() if id(tensor) in read}


def _frozen(model: nn.Module) -> set[str]:
    """Weights that do not train, in a model of which something does."""
    names = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for name, tensor in names.items() if not tensor.requires_grad}
    return frozen if len(frozen) < len(names) else set()


def _unlike(dense: nn.Module, layers: Mapping[str, Sequence[Layer]], samples: Samples, whole: bool) -> set[str]:
    """Layers whose outputs their weight does not say; by a few of every rank's own samples."""
    device = next(dense.parameters()).device

    with sharing(samples, whole) as (own, _):

        def run() -> None:
            for x, _ in islice(own.bounded(FEW), 1):
                call(dense, fresh(to(x, device)))

        found = unlike_their_weights(layers, run)
    return {name for theirs in ranks.gathered(sorted(found)) for name in theirs}


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _bias_kept(holders: Counter[int], weight: str, layers: Sequence[Any], masks: Mapping[str, Tensor]) -> Tensor | None:
    """Which of a layer's biases stay, ``(outputs,)``; None where they are not solved for: there is none, it is frozen, or one of

    several layers that share the weight or the bias would get what is another's.

    Args:
        holders: how many modules hold each parameter, by identity.
    """
    bias = layers[0].bias
    if bias is None or not bias.requires_grad or len(layers) > 1 or holders[id(bias)] > 1:
        return None
    keep = masks.get(_bias_of(weight))
    return torch.ones_like(bias, dtype=torch.bool) if keep is None else keep.to(bias.device).bool()


def _stays(keep: Tensor | None) -> bool:
    return keep is not None and bool(keep.any())


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
                    call(dense, fresh(to(x, device)))
            add_up(grams, device)
        for name in list(grams):
            gram = grams.pop(name)
            yield Moments([name], gram, gram)


def _of_both(
    models: tuple[nn.Module, nn.Module],
    layers: tuple[Mapping[str, list[Layer]], Mapping[str, list[Layer]]],
    banks: Collection[str],
    gone: Collection[str],
    masks: Mapping[str, Tensor],
    damping: float,
    samples: Samples,
    whole: bool,
) -> Iterator[Moments | str]:
    """With what reaches a layer in the pruned model for ``x̃``; a layer that is changed before the next is asked for is seen so.

    Layers with the same inputs have the same sums, and come together. The experts of a mixture are solved for here, in the pruned
    model, and named.
    """
    if not len(samples):
        raise UsageError("layerwise needs calibration samples; it got none")
    shared = partial(sharing, samples, whole)
    without = tuple([layer for name in gone for layer in held[name]] for held in layers)
    mine, theirs = ({name: held for name, held in every.items() if name not in gone} for every in layers)
    with shared() as (own, _):
        both = Abreast(models, (mine, theirs), own, samples.rows(0, 1)[0], ACTIVATIONS, Path(tempfile.gettempdir()), gone)
        pairs = both.pairs()
    while True:
        with shared():
            pair = next(pairs, None)
            if pair is None:
                return
            name, found = pair.names[0], None
            if name in banks:
                mend(pair, masks[name], without, damping, _divide)
            else:
                found = _sums(pair, without)
        yield name if found is None else found


def _sums(pair: Pair, gone: Sequence[Sequence[Layer]]) -> Moments:
    """The sums of a pair; the dense model's inputs of one batch are held.

    Where the two models send a layer other rows, as a router may, none of which belong together, ``x`` is ``x̃``. Of a layer
    that is called more than once in a run no sum is kept: what a later call's lacks holds what its own earlier ones did.

    Args:
        gone: layers that compute nothing any more, in each model.
    """
    layer = pair.one[0]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups, outputs, size = to_rows(layer, weight).shape
    gram = torch.zeros(groups, size + 1, size + 1, dtype=torch.float64, device=weight.device)
    cross, alike, added = torch.zeros_like(gram), True, len(pair.names) == 1
    lacking = gram.new_zeros(groups, outputs, size + 1)
    for one, other in pair.batches:
        ours, theirs = (
            _seen(held, run, without) for held, run, without in zip((pair.one, pair.other), (one, other), gone, strict=True)
        )
        alike = alike and [each.x.shape for each in ours] == [each.x.shape for each in theirs]
        added = added and alike and all(len(each) == 1 and each[0].added is not None for each in (ours, theirs) if each)
        for number, each in enumerate(theirs):
            before = rows(ours[number].layer, ours[number].x) if alike else repeat(None)
            short = _shortage(ours[number], each) if added else None
            if short is not None and not bool(short.isfinite().all()):  # a mask of -inf, say, is added
                added, short = False, None
            begin = 0
            for turned, given in zip(rows(each.layer, each.x), before, strict=alike):
                turned = _with_one(turned)
                gram.baddbmm_(turned.transpose(1, 2), turned)
                if given is not None:
                    cross.baddbmm_(turned.transpose(1, 2), _with_one(given))
                if short is not None:
                    end = begin + turned.shape[1]
                    lacking.baddbmm_(short[:, begin:end].transpose(1, 2), turned)
                    begin = end
    ranks.add_up([gram, cross, lacking])
    every = ranks.gathered((alike, added))
    return Moments(
        pair.names,
        gram,
        cross if all(same for same, _ in every) else gram.clone(),
        lacking if all(known for _, known in every) else None,
    )


@dataclass(frozen=True)
class _Seen:
    """An input that reached a layer, and what the layer's outputs were added to, if that is known."""

    layer: Layer
    x: Tensor
    added: Tensor | None


def _seen(layers: Sequence[Layer], run: Callable[[], Any], gone: Sequence[Layer]) -> list[_Seen]:
    """Every input that reaches one of the layers."""
    seen: list[tuple[Layer, Tensor]] = []
    with reaching({"": layers}, lambda name, layer, x: seen.append((layer, x.clone()))), following(layers, gone) as sums:
        sums.end(run())
    return [_Seen(layer, x, added) for (layer, x), added in zip(seen, sums.found, strict=True)]


def _shortage(one: _Seen, other: _Seen) -> Tensor:
    """``r - r̃`` as the layer's rows are, ``(groups, rows, outputs / groups)``."""
    assert one.added is not None
    assert other.added is not None
    return output_rows(one.layer, one.added.double() - other.added.double())


def _solve(layer: Any, sums: Moments, keep: Tensor, bias_keep: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """The compensated weight, of its shape, and biases ``(outputs,)``, float64."""
    gram, cross = sums.gram, sums.cross
    size = gram.shape[1] - 1
    weight, kept = (to_rows(layer, tensor).reshape(-1, size) for tensor in (layer.weight, keep))
    bias = layer.bias
    if bias_keep is None:  # then both sides of the error have the same, or none, which drops out
        bias, bias_keep = weight.new_zeros(len(kept)), torch.zeros_like(kept[:, 0])
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
                if sums.lacking is not None:
                    lacking = lacking + sums.lacking[group][which == number][:, stays]
                change = _divide(damped[stays][:, stays], lacking.T).T
                solved[those] = torch.zeros_like(old).masked_scatter(stays.expand_as(old), old[:, stays] + change)
    return from_rows(layer, solved[:, :-1].reshape(len(gram), each, size)), solved[:, -1]


def _divide(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a symmetric matrix without negative eigenvalues; the smallest solution where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) == 0 and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right
