"""Every layer of a model pruned in place, in the order in which they run; who asks keeps of each what it wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.blocks import ACTIVATIONS, Home, Part, Passing
from prunekit.criteria.layer_inputs import TRANSPOSED, Layer, from_rows, layers_with_inputs, not_finite, to_rows
from prunekit.data import Samples
from prunekit.data.sharing import sharing
from prunekit.errors import NonFiniteError, PrunekitError, UsageError, nearest
from prunekit.layerwise import admm, magnitude, sparsegpt, wanda
from prunekit.layerwise.amount import WITHIN, Amount
from prunekit.layerwise.method import Method, Problem, Solved
from prunekit.layerwise.moments import precision, summed
from prunekit.progress import Bar
from prunekit.structure import asked_sparsity, pattern_of
from prunekit.structure.prunable import prunable_parameters
from prunekit.trajectory import Layout

METHODS: dict[str, Method] = {
    "magnitude": magnitude.METHOD, "wanda": wanda.METHOD, "sparsegpt": sparsegpt.METHOD, "admm": admm.METHOD,
}  # fmt: skip
"""To add a method, write a file with a ``METHOD`` and enter it here."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a layer-wise method; the arguments of ``prunekit.prune_layerwise``, checked.

    Attributes:
        shares: by parameter, the share that goes of it; None for ``sparsity`` of every layer.

    Raises:
        UsageError: an unknown method or structure, or a value out of range.
    """

    method: str = "sparsegpt"
    sparsity: float | None = None
    structure: str = "unstructured"
    within: str | None = None
    damping: float = 0.01
    ignore: Sequence[str] = ()
    include: Sequence[str] = ()
    activations: int = ACTIVATIONS
    shares: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        _ = self.amount
        if not 0 <= self.damping < float("inf"):
            raise UsageError(f"damping is {self.damping}; it must be at least 0")
        if self.activations < 1:
            raise UsageError(f"activations is {self.activations} bytes; it must be at least 1")

    @property
    def chosen(self) -> Method:
        return get_method(self.method)

    @property
    def amount(self) -> Amount:
        return amount_of(self.structure, self.sparsity, self.within, self.chosen)

    def amount_in(self, name: str) -> Amount:
        """What one layer loses."""
        return self.amount if self.shares is None else replace(self.amount, sparsity=self.shares.get(name, 0.0))


class Pruning:
    """A model's layers, each solved and put in its place when it is asked for: iterate over it, once.

    Several ranks share the samples, and the layers of a part: each solves some, and gives them to the others.

    Args:
        model: in evaluation mode; changed.
        asked: how much goes, and how.
        samples: calibration samples.
        home: where the model's weights lie, and where blocks compute.
        spill: a folder for activations beyond their bytes; None refuses these.
        whole: whether several ranks may not share the samples, see ``prunekit.task.evaluation.mixing``.

    Attributes:
        layers: that are pruned, by parameter, in model order.
        refused: what stays whole, and why.
        by_magnitude: layers that no sample reached, once they were solved.
        blocks: that are passed one by one; none where the whole model runs for each layer.

    Raises:
        UsageError: there is no sample, or no layer.
    """

    def __init__(
        self, model: nn.Module, asked: Asked, samples: Samples, home: Home, spill: Path | None = None, whole: bool = False
    ) -> None:
        if not len(samples):
            raise UsageError("prune_layerwise needs calibration samples; it got none")
        self._asked = asked
        layers, self.refused = _layers(model, asked)
        self._sharing = partial(sharing, samples, whole)
        with self._sharing() as (own, _):
            self._passing = Passing(model, layers, own, samples.rows(0, 1)[0], home, asked.activations, spill)
        self.layers = self._passing.layers
        self.refused |= {name: "lies outside the blocks, which alone are pruned" for name in layers if name not in self.layers}
        self._check_shares()
        self.blocks = [block for stack in self._passing.stacks for block in stack.blocks]
        self.by_magnitude: list[str] = []
        self._facts = {"samples": len(samples), "data": samples.digest()}

    def _check_shares(self) -> None:
        """Raises UsageError where something is to go of what stays whole here: less would go than is said."""
        for name, share in (self._asked.shares or {}).items():
            if share and name not in self.layers:
                raise UsageError(
                    f"shares: the plan removes {share:.1%} of {name}, and by layers it stays whole "
                    f"({self.refused.get(name, 'it is not prunable')}); score again without it (ignore=[{name!r}], in a recipe "
                    "prunable.ignore), overwriting the scores, for a plan of the others alone"
                )

    def __iter__(self) -> Iterator[tuple[str, Solved]]:
        """By parameter what stays, in its weight's shape.

        Raises:
            UsageError: activations take more than they may.
            NonFiniteError: what reaches a layer is NaN or Inf.
            PrunekitError: with ``damping`` too small, a layer's inputs cannot be told apart.
        """
        with Bar(f"prune: {self._asked.method}", len(self.layers)) as bar:
            for part in self._passing.parts():
                for name, solved in self._solved(part):
                    _weight(part.layers[name][0]).copy_(solved.weight)
                    yield name, solved
                    bar.advance()

    def facts(self) -> dict[str, Any]:
        """What plans and records say of it, afterwards."""
        asked = self._asked
        return {
            "within": asked.amount.within if asked.amount.pattern is None else asked.structure,
            **self._facts,
            "changes": asked.chosen.changes,
            **({"damping": asked.damping} if asked.chosen.changes else {}),
            **({"by_magnitude": self.by_magnitude} if self.by_magnitude else {}),
        }

    def _solved(self, part: Part) -> Iterable[tuple[str, Solved]]:
        """Every layer of a part, solved, in its weight's shape; layers that no input reaches join ``by_magnitude``."""
        method = self._asked.chosen
        with self._sharing():
            sums = summed(part.layers, method.moments, part.batches)
        for name, moments in sums.items():
            if not bool(moments.isfinite().all()):
                raise not_finite(name)
        if method.moments is not None:
            self.by_magnitude += [name for name in part.layers if name not in sums]
        holding = {name: layer for name, (layer, *_) in part.layers.items()}
        by = _dealt(holding)
        done = {}
        if ranks.size() > 1:  # each solves its own before it waits for what another solves
            done = {name: self._one(name, layer, sums) for name, layer in holding.items() if by[name] == ranks.rank()}
        for name, layer in holding.items():
            if name in done:
                solved = done.pop(name)
            elif by[name] == ranks.rank():
                solved = self._one(name, layer, sums)
            else:
                solved = Solved(_weight(layer), torch.empty_like(_weight(layer), dtype=torch.bool))
            found = ranks.same({"weight": solved.weight, "keep": solved.keep}, by[name])
            yield name, Solved(found["weight"], found["keep"])

    def _one(self, name: str, layer: Layer, sums: Mapping[str, Tensor]) -> Solved:
        """A layer solved, in its weight's shape and type."""
        method, damping = self._asked.chosen, self._asked.damping
        weight = to_rows(layer, _weight(layer))
        weight = weight.to(precision(weight))
        reached = name in sums or method.moments is None
        try:
            found = (method if reached else magnitude.METHOD).solve(
                Problem(weight, sums.get(name, weight.new_empty(0)), damping), self._asked.amount_in(name)
            )
        except PrunekitError as error:
            raise PrunekitError(f"{name}: {error}") from None
        if not bool(found.weight.isfinite().all()):
            raise NonFiniteError(f"{name}: its weights would be NaN or Inf; damping is {damping:g}, give a larger one")
        return Solved(from_rows(layer, found.weight).to(_weight(layer).dtype), from_rows(layer, found.keep).contiguous())


def _weight(layer: Layer) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _dealt(layers: Mapping[str, Layer]) -> dict[str, int]:
    """By parameter the rank that solves the layer, so that all have about as much to do: the largest first, to who has least."""
    shapes = {name: to_rows(layer, _weight(layer)).shape for name, layer in layers.items()}
    work = {name: groups * size**2 * (size + outputs) for name, (groups, outputs, size) in shapes.items()}
    loads = [0] * ranks.size()
    found = {}
    for name in sorted(work, key=work.__getitem__, reverse=True):
        found[name] = min(range(len(loads)), key=loads.__getitem__)
        loads[found[name]] += work[name]
    return found


def get_method(name: str) -> Method:
    """Looks a method up.

    Raises:
        UsageError: unknown; near names are offered.
    """
    if name not in METHODS:
        raise UsageError(f"layer-wise method {name!r} does not exist; {nearest(name, list(METHODS))}")
    return METHODS[name]


def amount_of(structure: str, sparsity: float | None, within: str | None, method: Method) -> Amount:
    """How much every layer loses.

    Raises:
        UsageError: no layer-wise method does that.
    """
    if within is not None and within not in WITHIN:
        raise UsageError(f"within is {within!r}; {nearest(within, list(WITHIN))}")
    pattern = pattern_of(structure)
    if structure != "unstructured" and (pattern is None or pattern.kind != "nm"):
        raise UsageError(
            f"structure {structure!r}: layer-wise methods remove single weights; take unstructured or N:M, such as 2:4"
        )
    if pattern is not None and within == "layer":
        raise UsageError(f"within is 'layer', and {structure} keeps as much in every row; leave within out")
    return Amount(asked_sparsity(structure, sparsity), within or method.within, pattern)


def _layers(model: nn.Module, asked: Asked) -> tuple[Mapping[str, list[Layer]], dict[str, str]]:
    """The layers of the prunable parameters; and what has none, and why."""
    prunable = prunable_parameters(model, Layout.of(model), asked.ignore, asked.include)
    layers, unfit = layers_with_inputs(model, prunable)
    refused = {name: f"{why} is no linear layer or convolution" for name, why in unfit.items()}
    if asked.amount.pattern is not None:
        turned = [name for name, holding in layers.items() if isinstance(holding[0], TRANSPOSED)]
        refused |= dict.fromkeys(turned, "N:M does not run along a transposed convolution's inputs")
        layers = {name: holding for name, holding in layers.items() if name not in turned}
    if not layers:
        raise UsageError(f"no layer to prune: {'; '.join(f'{name}: {why}' for name, why in refused.items())}")
    return layers, refused
