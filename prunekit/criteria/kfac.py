"""K-FAC: what removing costs in second order, by each layer's inputs and the loss's gradients at its outputs.

The loss's curvature by a layer's weight is taken as ``G ⊗ H`` (Martens and Grosse 2015, arXiv 1503.05671; of convolutions Grosse
and Martens 2016, arXiv 1602.01407): ``H`` the mean of ``x xᵀ`` over samples and positions, a constant 1 among the inputs where
there is a bias, and ``G`` the same of the loss's gradients by the outputs, at the true labels (the empirical Fisher). A weight
that goes while the others of its output make up for it costs ``½ θ_ij² G_ii / [H⁻¹]_jj``: ``obs``, with every output weighted by
what it means to the loss, so that layers can be compared.

A unit costs what the columns do that *read* it, in all layers that read it, while all other columns make up for them. Units
leave one after the other, the cheapest first, and a unit's score is its cost when its turn came
(``prunekit.criteria.one_by_one``): of two neurons that say the same one is free, and the other costs what both are worth. LLM
Surgeon (van der Ouderaa et al. 2024, arXiv 2312.17244) removes by the same curvature, in shots. It takes ``d³`` operations once
for a layer with ``d`` inputs. ``--compensate`` does what these costs count on. The structures are ``heads``, ``neurons`` and
``channels``, joined ones too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.criteria.by_inputs import axes_that_read, portions, with_others_by_magnitude
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.group_scores import key_of
from prunekit.criteria.layer_inputs import (
    Layer,
    by_features,
    from_rows,
    input_of,
    layers_with_inputs,
    refuse_unfit,
    rows,
    to_rows,
    unreached,
)
from prunekit.criteria.one_by_one import Reader, costs_in_turn
from prunekit.criteria.units import units_of
from prunekit.errors import StructureError
from prunekit.measure.macs import unfused
from prunekit.structure import Group

DAMPING = 0.01
STRUCTURES = ("heads", "neurons", "channels")


@dataclass(frozen=True)
class _Curvature:
    """Of one layer: ``[H⁻¹]``, ``G``'s diagonal, and ``Wᵀ G W`` where it reads units; a batch axis over groups before all."""

    inverse: Tensor
    outputs: Tensor
    quadratic: Tensor | None
    reached: Tensor

    def of_each(self) -> Tensor:
        """``G_ii / (2 [H⁻¹]_jj)``, ``(groups, outputs / groups, d)``; 0 for inputs that are always 0."""
        inputs = (self.reached / self.inverse.diagonal(dim1=1, dim2=2)[:, : self.reached.shape[1]])[:, None]
        return self.outputs[:, :, None] * inputs / 2

    def readers(self, units: Tensor) -> Iterator[Reader]:
        """What its groups read.

        Args:
            units: the number of the unit that an input belongs to, ``(groups, d)``; -1 for none.
        """
        assert self.quadratic is not None
        for group, numbers in enumerate(units):
            (columns,) = torch.nonzero(numbers >= 0, as_tuple=True)
            if not len(columns):
                continue
            columns = columns[numbers[columns].argsort(stable=True)]
            mine, counts = numbers[columns].unique_consecutive(return_counts=True)
            alive = self.reached[group].double()
            d = len(alive)
            quadratic = torch.zeros_like(self.inverse[group])
            quadratic[:d, :d] = self.quadratic[group] * alive * alive[:, None]
            yield Reader(self.inverse[group].clone(), quadratic, mine, columns.view(len(mine), int(counts[0])))


@dataclass
class _Sums:
    """Sums over samples and positions of one layer.

    Attributes:
        inputs: ``Σ x xᵀ``, ``(groups, d, d)``, of ``d + 1`` inputs where there is a bias.
        outputs: ``Σ g²``, ``(groups, outputs / groups)``.
        quadratic: ``Σ (Wᵀ g)(Wᵀ g)ᵀ``, ``(groups, d, d)``; None of layers that read no unit.
        rows: how many there were, ``(1,)``.
        size: ``d``.
    """

    inputs: Tensor
    outputs: Tensor
    quadratic: Tensor | None
    rows: Tensor
    size: int

    @classmethod
    def of(cls, layer: Layer, reads: bool) -> _Sums:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        groups, outputs, d = to_rows(layer, weight).shape
        size = d + (layer.bias is not None)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=weight.device)

        return cls(zeros(groups, size, size), zeros(groups, outputs), zeros(groups, d, d) if reads else None, zeros(1), d)

    def add(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """One call of the layer: its input, and the loss's gradient by its output."""
        for piece in rows(layer, x):
            constant = piece.new_ones(*piece.shape[:2], self.inputs.shape[1] - piece.shape[2])
            whole = torch.cat([piece, constant], 2)
            self.inputs.baddbmm_(whole.transpose(1, 2), whole)
            self.rows += piece.shape[1]
        if not by_features(layer):
            gradient = gradient.movedim(gradient.dim() - layer.weight.dim() + 1, -1)  # type: ignore[operator]
        g = gradient.reshape(-1, len(self.outputs), self.outputs.shape[1]).transpose(0, 1).double()
        self.outputs += g.square().sum(1)
        if self.quadratic is not None:
            back = g @ to_rows(layer, layer.weight.detach()).double()  # type: ignore[operator]
            self.quadratic.baddbmm_(back.transpose(1, 2), back)

    def tensors(self) -> list[Tensor]:
        return [self.inputs, self.outputs, self.rows, *([] if self.quadratic is None else [self.quadratic])]

    def curvature(self, damping: float, counted: float) -> _Curvature:
        """Of the mean loss.

        Args:
            counted: how many samples, or tokens, that mean is over.
        """
        mean = self.inputs / self.rows
        diagonal = mean.diagonal(dim1=1, dim2=2)
        reached = diagonal[:, : self.size] > 0
        level = damping * diagonal[:, : self.size].mean(1, keepdim=True)
        diagonal.add_(torch.where(diagonal > 0, level, 1.0))
        quadratic = None if self.quadratic is None else counted * self.quadratic
        return _Curvature(torch.linalg.inv(mean), counted * self.outputs, quadratic, reached)


def _summed(evidence: Evidence, names: Sequence[str], reading: Collection[str]) -> dict[str, _Sums]:
    """The sums of some layers over all scoring samples, of all ranks."""
    function, batches = evidence.batch_losses()
    layers, _ = layers_with_inputs(function.model, names)
    sums = {name: _Sums.of(holding[0], name in reading) for name, holding in layers.items()}
    hooks = []
    for name, holding in layers.items():
        for layer in holding:

            def called(module: Layer, args: Any, keywords: Any, out: Tensor, name: str = name) -> None:
                if out.requires_grad:  # and not what checkpointing runs without a graph
                    x = input_of(args, keywords).detach()
                    out.register_hook(lambda gradient: sums[name].add(module, x, gradient))

            hooks.append(layer.register_forward_hook(called, with_kwargs=True))
    theta = evidence.state.to(function.device)
    try:
        with unfused(), function.at(theta) as leaves:
            for (x, y), share in batches:
                total = (function.here(x, y) * share).sum()
                if total.requires_grad:
                    torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    ranks.add_up([tensor for one in sums.values() for tensor in one.tensors()])
    return sums


def _counted(evidence: Evidence) -> float:
    """How many samples, tokens or class weights the mean loss is over."""
    samples = evidence.samples()
    groups = zip(samples, samples.groups, strict=True)
    return float(sum(evidence.task.loss.counted(labels, len(group)) for (_, labels), group in groups))


def _kfac(evidence: Evidence) -> CriterionResult:
    damping = float(evidence.options.get("damping", DAMPING))
    weights, waiting = evidence.weights(), _units(evidence)
    reading = {member[:-2] for _, members in waiting.values() for member in members}
    layers, unfit = layers_with_inputs(evidence.model, list(dict.fromkeys([*evidence.prunable, *reading])))
    unfit = {name: why for name, why in unfit.items() if name in evidence.prunable}
    if unfit and (not evidence.skip_unfit or not layers):
        refuse_unfit(unfit, "kfac")
    counted = _counted(evidence)
    importance: dict[str, Tensor] = {}
    units: dict[str, Tensor] = {}
    read: dict[str, _Curvature] = {}
    for some in portions(layers, 2):
        for name, sums in _summed(evidence, list(some), reading).items():
            if not float(sums.rows):
                continue
            layer, weight = some[name][0], weights[name].cpu()
            found = sums.curvature(damping, counted)
            if name in evidence.prunable:
                factors = from_rows(layer, found.of_each().cpu())
                importance[name] = (factors * weight.double().square()).to(weight.dtype)
            if found.quadratic is not None:
                read[name] = found
        ready = [key for key, (_, members) in waiting.items() if members and all(member[:-2] in read for member in members)]
        for key in ready:
            group, members = waiting.pop(key)
            readers = [one for m in members for one in _readers(layers[m[:-2]][0], group, m, read[m[:-2]])]
            units[key] = costs_in_turn(readers, group.size, f"units of {group.name}").view(1, 1, -1)
        needed = {member[:-2] for _, members in waiting.values() for member in members}
        read = {name: found for name, found in read.items() if name in needed}
    unfit |= unreached(importance, [name for name in evidence.prunable if name not in unfit])
    result = with_others_by_magnitude(evidence, importance, unfit, "kfac", power=2)
    return replace(result, axis_sums=units, gradient_evaluations=len(evidence.samples()))


def _units(evidence: Evidence) -> dict[str, tuple[Group, list[str]]]:
    """Groups of all structures that the model has, by their key, and which of their members are the columns that read them."""
    axes, found = axes_that_read(evidence.model, [entry.name for entry in evidence.layout]), {}
    for structure in STRUCTURES:
        try:
            groups = units_of(evidence, structure)
        except StructureError:  # the model has none of these
            continue
        for group in groups:
            columns = [member for member in group.members if axes.get(member[:-2]) == int(member[-1])]
            found[key_of(group.members)] = group, columns
    return found


def _readers(layer: Layer, group: Group, member: str, found: _Curvature) -> Iterator[Reader]:
    axis = member[-1]
    weight: Tensor = layer.weight  # type: ignore[assignment]
    numbers = torch.full((weight.shape[int(axis)],), -1)
    numbers[group.members[member].flatten()] = torch.arange(group.size).repeat_interleave(group.members[member].shape[1])
    spread = numbers.view(-1, *[1] * (weight.dim() - int(axis) - 1)).expand(weight.shape)
    yield from found.readers(to_rows(layer, spread)[:, 0].to(found.inverse.device))


CRITERION = Criterion(
    _kfac,
    "second-order cost by K-FAC; units leave one by one (arXiv 2312.17244)",
    needs_data=True,
    by_inputs=True,
    group="units",
    accepts=("damping",),
    silent_on=("layers", "experts"),
)
